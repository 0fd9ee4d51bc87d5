"""Checkpoints: heads, prefixes, ties, dtypes, shards, sizes, damage, and saves that fail half way."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_r2.saving
from hf_r2 import R2QuantConfig, quantize
from hf_r2.packed_layers import is_packed, packed_layers
from tests.models import float_model, inputs_for, logits

ROOT = Path(__file__).parents[1]


def packed_bert(**options):
    return quantize(float_model("bert"), R2QuantConfig(**{"weight_bits": 4, **options}))


def load(folder, **options):
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def test_fresh_head_on_a_packed_base_stays_float(tmp_path):
    base = quantize(float_model("bert").bert, R2QuantConfig(weight_bits=4))
    base.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not is_packed(model.classifier)
    assert is_packed(model.bert.pooler.dense)


def test_base_model_from_a_checkpoint_with_a_head(tmp_path):
    model = packed_bert()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = (m(**inputs_for("bert")).last_hidden_state for m in (model.bert, base))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_tied_tables_share_their_codes_and_generate(tmp_path):
    model = quantize(float_model("marian"), R2QuantConfig(weight_bits=3))
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert m.lm_head.weight_packed.data_ptr() == m.model.shared.weight_packed.data_ptr()
        assert m.lm_head.weight.data_ptr() == m.model.shared.weight.data_ptr()
    ids = inputs_for("marian")["input_ids"]
    one, two = (m.generate(ids, num_beams=2, max_new_tokens=5) for m in (model, loaded))
    assert torch.equal(one, two)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum("weight_packed" in key and ("shared" in key or "embed_tokens" in key) for key in file.keys()) == 1


def test_sharded(tmp_path):
    model = packed_bert()
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits(load(tmp_path), "bert"), logits(model, "bert"), rtol=0, atol=0)
    model.save_pretrained(tmp_path)  # whole again: no shard is left over
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_the_scales(dtype, tmp_path):
    packed_bert().save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    cast = load(tmp_path)
    cast._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # what model.to(dtype) does to every module
    for model in (loaded, cast):
        layer = model.bert.pooler.dense
        assert layer.weight.dtype == dtype
        assert layer.weight_scale.dtype == torch.float32
    torch.testing.assert_close(logits(loaded, "bert"), logits(cast, "bert"), rtol=0, atol=0)


def test_copies_devices_and_compilation(tmp_path):
    model = packed_bert()
    model.save_pretrained(tmp_path)
    expected = logits(model, "bert")
    torch.testing.assert_close(logits(copy.deepcopy(model), "bert"), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(load(tmp_path, device_map="cpu"), "bert"), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), "bert"), expected)


def test_trainer_trains_what_is_left_in_float(tmp_path):
    from tests.workers.train_tiny import tiny_pairs

    model = packed_bert()
    codes = model.bert.pooler.dense.weight_packed.clone()
    norm = model.bert.embeddings.LayerNorm.weight.clone()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=0.1
    )
    Trainer(
        model=model,
        args=args,
        train_dataset=tiny_pairs().map(lambda r: {"input_ids": [i % 40 for i in r["input_ids"]]}),
    ).train()
    assert torch.equal(model.bert.pooler.dense.weight_packed, codes)
    assert not torch.equal(model.bert.embeddings.LayerNorm.weight, norm)
    torch.testing.assert_close(
        logits(load(tmp_path / "checkpoint-2"), "bert"), logits(model.eval(), "bert"), rtol=0, atol=0
    )


@pytest.mark.parametrize(("bits", "options"), [(1, {}), (3, {}), (4, {"symmetric": False}), (2, {"method": "dkm"})])
def test_file_holds_the_bits_and_little_else(bits, options, tmp_path):
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024
    )
    model = tf.BertForSequenceClassification(config)
    weights = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    rest = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in weights)
    expected = sum(w.numel() for w in weights) * bits / 8 + 4 * rest
    if options.get("method") == "dkm":
        expected += 4 * 2**bits * len(weights)
    else:
        expected += sum(w.shape[0] for w in weights) * (4 if options.get("symmetric", True) else 5)
    quantize(model, R2QuantConfig(weight_bits=bits, **options)).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert expected <= size <= 1.03 * expected


def test_without_the_import_weights_are_random_and_a_warning_says_so(tmp_path):
    packed_bert().save_pretrained(tmp_path)
    load = f"t.AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})"
    code = f"import transformers as t; print(type({load}.classifier))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "torch.nn.modules.linear.Linear" in done.stdout
    assert "hf_r2" in done.stderr


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.9, 0.999])
def test_flipped_bits_are_found(place, tmp_path):
    packed_bert().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, header + int(place * (file.stat().st_size - header)))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: the bytes of '.+' changed"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [4, 100, 0.5, -1])
def test_cut_files_are_found(keep, tmp_path):
    packed_bert().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))] if isinstance(keep, float) else data[:keep])
    with pytest.raises(Exception, match=r"damaged|[Hh]eader"):
        load(tmp_path)


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["layers"].update(nowhere={"bits": 4, "kind": "affine"}), "names layer 'nowhere', which neither"),
        (lambda q: q["layers"]["classifier"].update(bits=5), "layer 'classifier': weight_packed has shape"),
        (lambda q: q["layers"]["classifier"].update(bits=0), "bits must be an integer from 1 to 8, got 0"),
        (lambda q: q["layers"]["classifier"].update(kind="magic"), "kind must be 'affine' or 'palette'"),
        (lambda q: q["layers"]["classifier"].update(shiny=1), "fields this hf_r2 does not know"),
        (lambda q: q.update(version=99), "format version 99, and this hf_r2 reads up to"),
        (
            lambda q: q["layers"].update({"encoder.layer.0.output.LayerNorm": {"bits": 4, "kind": "affine"}}),
            "a LayerNorm in BertForSequenceClassification: only linear, convolution and embedding",
        ),
    ],
)
def test_configs_that_do_not_fit(change, message, tmp_path):
    packed_bert().save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_codes_that_the_checkpoint_lacks(tmp_path):
    model = quantize(float_model("bert"), R2QuantConfig(weight_bits=4, skip=["classifier"]))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda q: q["layers"].update(classifier={"bits": 4, "kind": "affine", "channel_axis": 0}))
    with pytest.raises(ValueError, match="lacks the codes of layer 'classifier'"):
        load(tmp_path)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = packed_bert(), packed_bert(weight_bits=2)
    old.save_pretrained(tmp_path / "model")

    def full(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(load(tmp_path / "model"), "bert"), logits(old, "bert"), rtol=0, atol=0)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_kill_while_saving_leaves_the_old_checkpoint(tmp_path):
    old = packed_bert()
    old.save_pretrained(tmp_path / "model")
    code = f"""
import os, signal, transformers.modeling_utils as mu
from tests.models import float_model
from hf_r2 import R2QuantConfig, quantize
def kill(tensors, filename, metadata=None):
    open(filename, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
mu.safe_save_file = kill
quantize(float_model("bert"), R2QuantConfig(weight_bits=2)).save_pretrained({str(tmp_path / "model")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    torch.testing.assert_close(logits(load(tmp_path / "model"), "bert"), logits(old, "bert"), rtol=0, atol=0)
    old.save_pretrained(tmp_path / "model")  # and the next save clears what the kill left
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_save_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; save_pretrained needs a folder"):
        packed_bert().save_pretrained(tmp_path / "file")


def test_no_pickle_anywhere():
    for folder in ("hf_r2", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "import pickle" not in file.read_text(), file
            assert "torch.save" not in file.read_text(), file
            assert "torch.load" not in file.read_text(), file


def test_saving_module_is_used():
    model = packed_bert()
    assert model.save_pretrained.__func__ is hf_r2.saving.save_beside
    assert len(packed_layers(model)) == 11
