"""Entropy-coded storage: streams against the entropy, checkpoints that hold them, and streams that were tampered with."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_r2 import R2QuantConfig, quantize
from hf_r2.entropy import (
    compress,
    compress_codes,
    decompress,
    decompress_codes,
    entropy,
    largest_stream,
    smallest_stream,
    symbol_count,
)
from hf_r2.packed_layers import packed_layers
from hf_r2.packing import pack_bits
from hf_r2.report import report
from tests.models import MODELS, float_model, logits


def test_entropy_by_hand():
    assert entropy(torch.tensor([0, 0, 3, 3], dtype=torch.uint8)) == 1
    assert entropy(torch.tensor([0, 1, 1, 1], dtype=torch.uint8)) == pytest.approx(2 - 0.75 * math.log2(3))
    assert entropy(torch.tensor([7, 7], dtype=torch.uint8)) == 0
    assert entropy(torch.empty(0, dtype=torch.uint8)) == 0


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_codes_come_back(bits, data):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    stream = compress_codes(packed, bits, len(codes))
    assert torch.equal(decompress_codes(stream, bits, len(codes)), packed)
    count = symbol_count(bits, len(codes))
    assert smallest_stream(count) <= stream.numel() <= largest_stream(count)


@pytest.mark.parametrize("bits", range(2, 9))
def test_streams_of_bell_shaped_codes_come_close_to_their_entropy(bits):
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    codes = (w / 6 * 2**bits + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    found = 8 * compress_codes(pack_bits(codes, bits), bits, len(codes)).numel() / len(codes)
    assert entropy(codes) * 0.999 < found < entropy(codes) * 1.02
    assert found < 0.95 * bits


@pytest.mark.parametrize("count", [10_000_000, 0])
def test_the_bounds_hold_for_what_compresses_best_and_worst(count):
    noise = torch.randint(256, (count // 20,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for data in (torch.zeros(count, dtype=torch.uint8), noise):
        assert smallest_stream(data.numel()) <= compress(data).numel() <= largest_stream(data.numel())


@pytest.mark.parametrize("shape", [(64, 4), (300, 1, 1, 1), (0, 1)])
def test_floats_come_back(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decompress(compress(values), values.shape, values.dtype), values)


def test_no_more_is_decompressed_than_was_declared():
    bomb = compress(torch.zeros(50_000_000, dtype=torch.uint8))
    with pytest.raises(ValueError, match="hold more than 1000000 bytes where 1000000 are needed"):
        decompress(bomb, torch.Size([1_000_000]), torch.uint8)
    with pytest.raises(ValueError, match="100 coded bytes cannot hold 10000000000 bytes"):
        decompress(bomb[:100], torch.Size([10_000_000_000]), torch.uint8)
    with pytest.raises(ValueError, match="hold 1000 bytes where 1001 are needed"):
        decompress(compress(torch.zeros(1000, dtype=torch.uint8)), torch.Size([1001]), torch.uint8)
    whole = compress(torch.arange(100, dtype=torch.uint8))
    for damaged in (whole[:-9], torch.cat([whole, whole]), whole.flip(0)):
        with pytest.raises(ValueError, match="coded bytes"):
            decompress(damaged, torch.Size([100]), torch.uint8)


KINDS = {
    "affine": {"weight_bits": 3},
    "asymmetric": {"weight_bits": 4, "symmetric": False},
    "palette": {"weight_bits": 2, "method": "dkm"},
    "vectors": {"weight_bits": 5, "method": "dkm", "options": {"dim": 2}},
}


@pytest.mark.parametrize("name", ["bert", "marian", "vit", "resnet"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_come_back(name, kind, tmp_path):
    packed = quantize(float_model(name), R2QuantConfig(**KINDS[kind], storage="entropy"))
    packed.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded = MODELS[name][1].from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, name), logits(packed, name), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["version"] == 2
    again = MODELS[name][1].from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again, name), logits(packed, name), rtol=0, atol=0)


def skewed(folder, storage="entropy"):
    """A model whose codes are mostly one: an outlier in each weight stretches the grid."""
    model = MODELS["marian"][0]()
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            parameter.data[0, 0] = 100 * parameter.data.std()
    packed = quantize(model, R2QuantConfig(weight_bits=4, granularity="per_tensor", storage=storage)).eval()
    packed.save_pretrained(folder)
    return packed


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_files_are_smaller_and_tied_tables_are_there_once(tmp_path):
    packed = skewed(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum("weight_packed" in key and ("shared" in key or "embed_tokens" in key) for key in tensors) == 1
    coded = sum(t.numel() for key, t in tensors.items() if key.endswith("weight_packed"))
    once = {id(m.weight_packed): m.weight_packed.numel() for m in packed_layers(packed).values()}
    assert coded < 0.6 * sum(once.values())
    loaded = MODELS["marian"][1].from_pretrained(tmp_path)
    assert loaded.lm_head.weight_packed.data_ptr() == loaded.model.shared.weight_packed.data_ptr()
    said = report(loaded)
    assert said["storage"] == "entropy"
    assert said["entropy"] < said["bits_per_weight"] < 4
    loaded.config.quantization_config.storage = "packed"
    loaded.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["version"] == 1 and not any("streams" in layer for layer in config["layers"].values())
    plain = MODELS["marian"][1].from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain, "marian"), logits(packed, "marian"), rtol=0, atol=0)
    assert report(plain)["bits_per_weight"] > 4
    dense = load_file(tmp_path / "model.safetensors")
    assert (report(plain)["size_bytes"], said["size_bytes"]) == (size(dense), size(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight_packed": 10**12},
            "weight_packed of layer '.+' takes 1000000000000 coded bytes, which cannot be right",
        ),
        ({"weight_packed": 1}, "takes 1 coded bytes, which cannot be right"),
        ({"weight_packed": "12"}, "takes '12' coded bytes, which cannot be right"),
        ({"weight_packed": 30}, r"weight_packed has shape \[\d+\] in the checkpoint, and \[30\] is needed"),
        ({"bias": 8}, "has an entropy-coded 'bias', which it cannot have"),
        ({"weight_centroids": 8}, "has an entropy-coded 'weight_centroids', which it cannot have"),
    ],
)
def test_sizes_that_cannot_be_right(change, message, tmp_path):
    skewed(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["decoder.layers.0.fc1"]["streams"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        MODELS["marian"][1].from_pretrained(tmp_path)


def test_a_stream_that_inflates_to_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_r2.coded.compress_codes", lambda packed, bits, count: compress(packed[:-1]))
    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4, storage="entropy"))
    packed.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"weight_packed of layer '.+': the coded bytes hold \d+ bytes where \d+ are"):
        MODELS["bert"][1].from_pretrained(tmp_path)


def test_settings_that_are_not_known():
    with pytest.raises(ValueError, match="storage must be one of packed, entropy; got 'zip'"):
        R2QuantConfig(storage="zip")


def test_the_table_of_gains(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    bench = importlib.import_module("bench_entropy")
    row = bench.row("tiny", float_model("bert"), "nearest", 4, "per_tensor")
    assert row["entropy"] < row["coded_bits_per_weight"] < row["bits_per_weight"]
    assert row["coded_compression"] / row["compression"] == pytest.approx(row["size_bytes"] / row["coded_size_bytes"])
    saved = 100 * (1 - row["coded_size_bytes"] / row["size_bytes"])
    assert bench.table([row]).splitlines()[2].startswith("| tiny | nearest | 4 bits per_tensor | 4.0")
    assert f"| {saved:.0f} % |" in bench.table([row])
