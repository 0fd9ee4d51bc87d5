"""Checkpoints that load without hf_r2: the same weights, and a report of what they do not hold."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_r2 import R2QuantConfig, prepare, quantize
from hf_r2.export.plain import to_float, to_native
from tests.models import MODELS, float_model, inputs_for, logits

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_US = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
for folder, architecture in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        found = model.eval()(**load_file(folder + "/inputs.safetensors")).logits
    save_file({"logits": found}, folder + "/logits.safetensors")
assert "hf_r2" not in sys.modules
"""
WIDTHS = {"*query": {"weight_bits": 2}, "*key": {"weight_bits": 8}, "*value": {"weight_bits": 1}}
EXPORTS = {  # folder: model, recipe, how it is written
    "marian": (R2QuantConfig(weight_bits=3), to_float),
    "mobilenet_v2": (R2QuantConfig(weight_bits=4), to_float),
    "bert": (R2QuantConfig(weight_bits=4, overrides=WIDTHS), to_native),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: packed model, folder, report}, each folder with the logits from a process that cannot see hf_r2."""
    root, done, arguments = tmp_path_factory.mktemp("plain"), {}, []
    for name, (config, write) in EXPORTS.items():
        packed = quantize(float_model(name), config)
        done[name] = (packed, root / name, write(packed, root / name))
        save_file(inputs_for(name), root / name / "inputs.safetensors")
        arguments += [str(root / name), type(float_model(name)).__name__]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return done


@pytest.mark.parametrize("name", EXPORTS)
def test_checkpoints_load_in_plain_transformers(name, exported):
    packed, folder, _ = exported[name]
    found = load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, logits(packed, name), rtol=1e-5, atol=1e-5)
    assert hasattr(packed.config, "quantization_config")  # the model itself is as it was


def test_float_checkpoints_hold_no_trace_of_us(exported):
    _, folder, said = exported["marian"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors").values()
    assert said["size_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert said["notes"] == [] and set(said["float_layers"].values()) == {"decoded"}


def test_native_checkpoints_hold_integers(exported):
    _, folder, said = exported["bert"]
    assert not said["float_layers"]
    bits = {name.rpartition(".")[2]: entry["bits"] for name, entry in said["layers"].items()}
    assert (bits["query"], bits["key"], bits["value"], bits["classifier"]) == (2, 8, 2, 4)
    stored = load_file(folder / "model.safetensors")
    assert stored["classifier.weight"].dtype == torch.uint8 and stored["classifier.weight"].shape == (2, 8)
    assert said["size_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())


def reloaded(folder, name):
    return MODELS[name][1].from_pretrained(folder).eval()


@pytest.mark.parametrize("options", [
    {"weight_bits": 3}, {"weight_bits": 5}, {"weight_bits": 4, "symmetric": False},
    {"weight_bits": 2, "granularity": "per_tensor"},
])  # fmt: skip
def test_weights_of_other_grids_are_the_same_to_the_bit(options, tmp_path):
    packed = quantize(float_model("mobilebert"), R2QuantConfig(**options))
    to_native(packed, tmp_path)
    plain = reloaded(tmp_path, "mobilebert")
    for name in (
        "classifier",
        "mobilebert.encoder.layer.0.attention.self.query",
        "mobilebert.embeddings.word_embeddings",
    ):
        layer, theirs = packed.get_submodule(name), plain.get_submodule(name)
        weight = theirs.weight if hasattr(theirs, "embedding_scale") else theirs._dequantize_weights()
        assert "Quantized" in type(theirs).__name__
        torch.testing.assert_close(weight, layer.weight, rtol=0, atol=0)


def test_what_does_not_fit_stays_float_and_is_named(tmp_path):
    packed = quantize(float_model("marian"), R2QuantConfig(weight_bits=4, act_bits=8, act_range="dynamic"))
    said = to_native(packed, tmp_path)
    assert set(said["float_layers"].values()) == {"its weight is shared with another layer"}
    assert any(
        note.startswith("model.encoder.layers.0.fc1: its inputs are rounded to 8 bits") for note in said["notes"]
    )
    for module in packed.modules():
        module._modules.pop("input_quantizer", None)
    torch.testing.assert_close(
        logits(reloaded(tmp_path, "marian"), "marian"), logits(packed, "marian"), rtol=1e-5, atol=1e-5
    )


def test_models_without_a_layer_that_fits(tmp_path):
    palette = quantize(float_model("bert"), R2QuantConfig(method="dkm", weight_bits=2))
    with pytest.raises(ValueError, match=r"no layer fits .*a palette's levels are no integers.*export 'float'"):
        to_native(palette, tmp_path)
    with pytest.raises(
        ValueError, match="needs a packed transformers model, got a BertForSequenceClassification with 0"
    ):
        to_float(float_model("bert"), tmp_path)
    half = prepare(copy.deepcopy(float_model("bert")), R2QuantConfig(method="lsq"))
    for write in (to_float, to_native):
        with pytest.raises(ValueError, match=r"half trained: call hf_r2.convert\(model\)"):
            write(half, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_script_writes_both_and_says_what_is_in_them(tmp_path):
    config = R2QuantConfig(weight_bits=4, symmetric=False, overrides={"classifier": {"weight_bits": 8}})
    quantize(float_model("bert"), config).save_pretrained(tmp_path / "packed")
    command = [
        sys.executable,
        "scripts/export.py",
        "--model_name_or_path",
        str(tmp_path / "packed"),
        "--format",
        "native",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, "--output", str(tmp_path / "native")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    said = json.loads((tmp_path / "native.json").read_text())
    assert (
        set(said["float_layers"]) == {"classifier"}
        and "quantize with symmetric=True" in said["float_layers"]["classifier"]
    )
    assert "10 of 11 layers on packed or integer weights" in run.stdout and "times smaller than float16" in run.stdout
    assert "float: its integers reach from " in run.stdout
    assert (tmp_path / "native/model.safetensors").is_file()
