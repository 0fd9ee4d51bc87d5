"""Core ML programs: compressed weights that decode to ours, bit for bit, read back from the file; and what is refused."""

import copy
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_r2 import R2QuantConfig, prepare, quantize
from hf_r2.export.coreml import to_coreml
from hf_r2.packed_layers import encoded, packed_layers
from tests.models import float_model, inputs_for

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {  # a width for each layer of the tiny BERT
    "*query": 1, "*key": 2, "*value": 3, "*attention.output.dense": 4, "*intermediate*": 5, "*layer.0.output.dense": 6,
    "*pooler*": 7, "classifier": 8, "*position_embeddings": 8, "*word_embeddings": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def ct():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        return pytest.importorskip("coremltools", reason="pip install '.[coreml]'")


def program(ct, file):
    """{name: operation} of the compressed weights in a saved program."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(file))
    weights = str(file / "Data/com.apple.CoreML/weights")
    loaded = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    return {
        op.name: op for f in loaded.functions.values() for op in f.operations if op.op_type.startswith("constexpr")
    }


def decoded(var):
    """The value of a weight, by numpy from what is stored: palettes, and codes times scales."""
    if var.val is not None:
        return np.asarray(var.val)
    op = var.op
    if op.op_type == "constexpr_lut_to_dense":
        axis = None if op.vector_axis is None else int(op.vector_axis.val)
        return looked_up(np.asarray(op.indices.val).astype(np.int64), decoded(op.lut), axis)
    codes, scale = decoded(op.data), np.asarray(op.scale.val)
    offset = 0 if op.offset is None else np.asarray(op.offset.val).astype(scale.dtype)
    return (codes.astype(scale.dtype) - offset) * scale


def looked_up(indices, palettes, axis):
    """`palettes` [groups of each axis.., entries, dim]; vectors lie along `axis`."""
    groups = [np.arange(n) * g // n for n, g in zip(indices.shape, palettes.shape, strict=False)]
    found = np.take_along_axis(palettes[np.ix_(*groups)], indices[..., None, None], axis=-2)[..., 0, :]
    if found.shape[-1] == 1:
        return found[..., 0]
    shape = list(indices.shape)
    shape[axis] *= found.shape[-1]
    return np.moveaxis(found, -1, axis + 1).reshape(shape)


def exported(ct, folder, name, precision="float32", **recipe):
    """Report, packed model and {layer: decoded weight, operation} of one export."""
    overrides = {glob: {"weight_bits": bits} for glob, bits in WIDTHS.items()} if name == "bert" else {}
    packed = quantize(float_model(name), R2QuantConfig(**{"overrides": overrides, **recipe}))
    inputs = inputs_for(name)
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])} if "input_ids" in inputs else {}
    said = to_coreml(packed, folder / "model.mlpackage", inputs, precision=precision)
    operations = program(ct, folder / "model.mlpackage")
    found = {}
    for layer in packed_layers(packed):
        tail, shape = f"_{layer.replace('.', '_')}_weight", packed.get_submodule(layer).weight_shape
        matching = (op for key, op in operations.items() if tail in key and op.outputs[0].shape == tuple(shape))
        op = next(matching, None)
        found[layer] = (op, None if op is None else decoded(op.outputs[0]))
    return said, packed, found


RECIPES = {
    "palettes": ("bert", {"method": "dkm"}),
    "symmetric": ("bert", {"weight_bits": 3}),
    "asymmetric": ("bert", {"weight_bits": 3, "symmetric": False}),
    "per_tensor": ("resnet", {"weight_bits": 3, "symmetric": False, "granularity": "per_tensor"}),
    "vectors": (
        "resnet",
        {"method": "dkm", "weight_bits": 3, "options": {"dim": 4}, "overrides": {"classifier*": {"options": {}}}},
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_weights_stay_compressed_and_decode_to_ours(kind, ct, tmp_path):
    name, recipe = RECIPES[kind]
    said, packed, found = exported(ct, tmp_path, name, **recipe)
    assert not said["float_layers"] and len(found) == len(said["layers"])
    for layer, module in packed_layers(packed).items():
        op, weight = found[layer]
        e = encoded(module)
        assert op is not None, layer
        assert torch.equal(torch.from_numpy(weight.copy()), e.decode()), layer
        if said["layers"][layer]["mode"] == "integer":
            assert op.op_type == "constexpr_blockwise_shift_scale" and e.bits in (4, 8) and e.centroids is None
        else:
            bits = {5: 6, 7: 8}.get(e.bits, e.bits)
            assert op.op_type == "constexpr_lut_to_dense" and op.lut.shape[-2:] == (2**bits, e.dim)
            assert op.indices.val.size == e.codes.numel()  # vectors: one index for each
    assert said["size_bytes"] > (tmp_path / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert sum(count for operator, count in said["operators"].items() if operator.startswith("constexpr")) >= len(
        found
    )


def test_float16_programs_hold_palettes_rounded_to_it(ct, tmp_path):
    _, packed, found = exported(ct, tmp_path, "resnet", "float16", method="dkm", weight_bits=4)
    for layer, module in packed_layers(packed).items():
        e = encoded(module)
        assert torch.equal(torch.from_numpy(found[layer][1].copy()), e.centroids.half()[:, 0][e.codes.int()]), layer


def test_what_the_program_does_not_do_is_said(ct, tmp_path):
    packed = quantize(float_model("resnet"), R2QuantConfig(weight_bits=4, act_bits=8, act_range="dynamic"))
    said = to_coreml(packed, tmp_path / "model.mlpackage", inputs_for("resnet"))
    assert (
        len(said["notes"]) == len(said["layers"])
        and "its inputs are rounded to 8 bits in this model" in said["notes"][0]
    )


def test_bad_input(ct, tmp_path):
    packed = quantize(float_model("resnet"), R2QuantConfig(weight_bits=4))
    file = tmp_path / "model.mlpackage"
    with pytest.raises(ValueError, match="precision must be one of float32, float16; got 'int8'"):
        to_coreml(packed, file, precision="int8")
    with pytest.raises(ValueError, match=r"ends in .mlpackage, got '.*model.onnx'"):
        to_coreml(packed, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"needs a packed model: call hf_r2.quantize"):
        to_coreml(float_model("resnet"), file)
    with pytest.raises(ValueError, match="may be half trained"):
        to_coreml(prepare(copy.deepcopy(float_model("resnet")), R2QuantConfig(method="lsq")), file)
    with pytest.raises(ValueError, match="coremltools cannot convert ResNetForImageClassification: "):
        to_coreml(packed, file, {"pixel_values": torch.zeros(1, 3, 0, 0)})


def test_without_the_package_the_command_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_r2.export.coreml.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs coremltools: pip install '\.\[coreml\]' in the folder of"):
        to_coreml(quantize(float_model("resnet"), R2QuantConfig(weight_bits=4)), tmp_path / "model.mlpackage")
