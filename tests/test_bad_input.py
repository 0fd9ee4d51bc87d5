"""What a user can get wrong: each mistake is named at the earliest moment; and plain modules on the same road."""

import json
import math

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, convert, packed_in_memory, prepare, quantize
from hf_r2.packed_layers import packed_layers
from hf_r2.report import report
from tests.models import float_model, inputs_for


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_bits": 0}, ValueError, "weight_bits must be an integer from 1 to 8, got 0"),
        ({"weight_bits": 9}, ValueError, "weight_bits must be an integer from 1 to 8, got 9"),
        ({"act_bits": 1}, ValueError, "act_bits must be 2 to 8 or None, got 1"),
        ({"method": "magic"}, ValueError, "no method called 'magic'; there are: nearest, mse, percentile"),
        ({"granularity": "per_row"}, ValueError, "granularity must be one of per_tensor, per_channel; got 'per_row'"),
        ({"act_range": "guess"}, ValueError, "act_range must be one of static, dynamic"),
        ({"symmetric": "yes"}, ValueError, "symmetric must be true or false"),
        ({"weight_bit": 4}, TypeError, "unknown settings weight_bit; known ones are: method, weight_bits"),
        ({"options": {"taw": 1}, "method": "dkm"}, TypeError, "no option taw; its options are: dim, tau, tau_units"),
        ({"options": {"tau": 0}, "method": "dkm"}, ValueError, "tau must be a positive number"),
        (
            {"options": {"iters": 1}},
            TypeError,
            "method 'nearest' has no option iters; its options are: fold, equalize",
        ),
        ({"overrides": {"a": {"bits": 3}}}, TypeError, "unknown settings bits; known ones are: weight_bits"),
        ({"overrides": {"a": {"weight_bits": 12}}}, ValueError, "weight_bits must be an integer from 1 to 8, got 12"),
        ({"skip": "classifier"}, ValueError, "skip must be a list of globs"),
    ],
)
def test_config(options, error, message):
    with pytest.raises(error, match=message):
        R2QuantConfig(**options)


@pytest.mark.parametrize("rule", [{"skip": ["clasifier"]}, {"overrides": {"clasifier": {"weight_bits": 8}}}])
def test_globs_that_match_nothing(rule):
    with pytest.raises(ValueError, match="'clasifier' matches no layer; the weight layers are: bert"):
        quantize(float_model("bert"), R2QuantConfig(**rule))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["nearest", "dkm"])
def test_weights_that_are_no_numbers(value, method):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[1, 1] = value
    with pytest.raises(ValueError, match="the weight of layer '1' holds NaN or infinity"):
        quantize(model, R2QuantConfig(method=method))


@pytest.mark.parametrize("method", ["nearest", "dkm"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_empty_and_constant_weights_are_exact(method, bits):
    torch.manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        model = nn.Sequential(nn.Embedding(0, 4), nn.Linear(4, 4, bias=False))
        model[1].weight.fill_(-0.37)
    for symmetric in (True, False):
        packed = quantize(model, R2QuantConfig(method=method, weight_bits=bits, symmetric=symmetric))
        assert packed[0].weight.shape == (0, 4)
        torch.testing.assert_close(packed[1].weight, model[1].weight.detach(), rtol=0, atol=0)


def test_calibration():
    model, config = float_model("bert"), R2QuantConfig(act_bits=8)
    good = inputs_for("bert")
    with pytest.raises(ValueError, match="batches are needed: act_bits with static ranges"):
        quantize(model, config)
    with pytest.raises(ValueError, match="at least one batch; batches was empty"):
        quantize(model, config, [])
    for bad in (
        {"pixels": good["input_ids"]},
        {"input_ids": good["input_ids"].float()},
        {"input_ids": torch.tensor([[99]])},
    ):
        with pytest.raises(ValueError, match=r"batch 1 \(keys .+\) was rejected by the model"):
            quantize(model, config, [good, bad])
    with pytest.raises(ValueError, match="batch 0: batches must be keyword dicts for forward, got Tensor"):
        quantize(model, config, [good["input_ids"]])
    with pytest.raises(ValueError, match="batch 0 holds NaN or infinity in 'pixel_values'"):
        quantize(float_model("resnet"), config, [{"pixel_values": torch.full((1, 3, 16, 16), math.nan)}])
    with pytest.raises(ValueError, match="batch 0 brings NaN or infinity to the input of layer"):
        quantize(float_model("resnet"), config, [{"pixel_values": torch.full((1, 3, 16, 16), 3e38)}])
    assert not packed_layers(model)  # the float model is as it was


def test_static_ranges_while_loading(tmp_path):
    float_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot quantize here without batches"):
        type(float_model("bert")).from_pretrained(tmp_path, quantization_config=R2QuantConfig(act_bits=8))


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match="nothing to quantize: the model has 0 float weight layers"):
        quantize(nn.LayerNorm(3), R2QuantConfig())
    with pytest.raises(ValueError, match="the model has 1 float weight layers, and none is selected"):
        quantize(nn.Sequential(nn.Linear(2, 2)), R2QuantConfig(skip=["*"]))


def test_a_storage_that_is_set_before_saving(tmp_path):
    packed = quantize(float_model("bert"), R2QuantConfig())
    with pytest.raises(ValueError, match="storage must be one of packed, entropy; got 'zstd'"):
        packed.config.quantization_config.storage = "zstd"
    packed.config.quantization_config.storage = "entropy"
    packed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["storage"] == "entropy"


def test_wrong_order():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="nothing to convert: call prepare"):
        convert(model)
    with pytest.raises(ValueError, match="prepare is for the methods that are trained"):
        prepare(model, R2QuantConfig(method="nearest"))
    with pytest.raises(ValueError, match="report needs a packed model"):
        report(model)
    prepare(model, R2QuantConfig(method="dkm"))
    with pytest.raises(ValueError, match="prepared already"):
        prepare(model, R2QuantConfig(method="dkm"))
    packed = convert(model)
    with pytest.raises(ValueError, match="packed already"):
        quantize(packed, R2QuantConfig())


def test_tied_layers_need_one_setting():
    with pytest.raises(ValueError, match="share one weight: skip all of them, or none"):
        quantize(float_model("marian"), R2QuantConfig(skip=["lm_head"]))
    with pytest.raises(ValueError, match="share one weight but have different settings"):
        quantize(float_model("marian"), R2QuantConfig(overrides={"lm_head": {"weight_bits": 8}}))


def test_overrides_skip_and_both_ends_by_default():
    model = float_model("bert")
    packed = packed_layers(quantize(model, R2QuantConfig(weight_bits=3)))
    assert {"bert.embeddings.word_embeddings", "classifier"} <= set(packed)
    config = R2QuantConfig(weight_bits=3, skip=["*embeddings*"], overrides={"classifier": {"weight_bits": 8}})
    mixed = quantize(model, config)
    layers = packed_layers(mixed)
    assert not any("embeddings" in name for name in layers)
    assert layers["classifier"].weight_layout.bits == 8
    assert layers["bert.pooler.dense"].weight_layout.bits == 3
    said = report(mixed)
    assert said["last_layer"] == {"name": "classifier", "bits": 8}
    assert said["policy"].endswith("last (classifier) at 8, the rest at 3")


def test_report_by_hand():
    model = nn.Sequential(nn.Linear(10, 4, bias=False), nn.Linear(4, 6))
    said = report(quantize(model, R2QuantConfig(weight_bits=3)))
    stored = 3 * 40 + 32 * 4 + 3 * 24 + 32 * 6  # codes and one float32 scale for each output channel
    assert said["bits_per_weight"] == pytest.approx(stored / 64)
    assert said["size_bytes"] == 15 + 16 + 9 + 24 + 4 * 6  # and the bias in float32
    assert said["compression"] == pytest.approx(2 * (64 + 6) / said["size_bytes"])
    assert said["policy"] == "first and last layers at 3 bits, like the rest"
    packed = quantize(nn.Linear(4, 2, bias=False), R2QuantConfig(weight_bits=1, symmetric=False))
    packed.weight_packed.data[:] = 0b11000001  # three codes of eight are 1
    assert report(packed)["entropy"] == pytest.approx(-(3 * math.log2(3 / 8) + 5 * math.log2(5 / 8)) / 8)
    palette = report(quantize(model, R2QuantConfig(method="dkm", weight_bits=2)))
    assert palette["bits_per_weight"] == pytest.approx((2 * 64 + 2 * 4 * 32) / 64)


class Zoo(nn.Module):
    """Every kind of layer, none of them from transformers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.one = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.two = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.up(self.one(self.table(ids).transpose(1, 2)))  # [B, 6, 2 T]
        x = self.grouped(self.two(x[:, None]).relu()).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"method": "dkm"}, {"act_bits": 8}], ids=str)
def test_plain_modules(options):
    torch.manual_seed(0)
    model, ids = Zoo().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    packed = quantize(model, R2QuantConfig(weight_bits=6, **options), [{"ids": ids}])
    assert set(packed_layers(packed)) == {"table", "one", "up", "two", "grouped", "attention.out_proj", "head"}
    torch.testing.assert_close(packed(ids), model(ids), rtol=0, atol=0.2)
    assert not torch.equal(packed(ids), model(ids))
    with packed_in_memory():
        other = quantize(Zoo().eval(), R2QuantConfig(weight_bits=6, **options), [{"ids": ids}])
    assert not torch.equal(other(ids), packed(ids))
    other.load_state_dict(packed.state_dict())
    torch.testing.assert_close(other(ids), packed(ids), rtol=0, atol=0)
    for name, axis in (("up", 1), ("head", 0)):
        if "method" not in options:
            assert packed.get_submodule(name).weight_layout.channel_axis == axis
