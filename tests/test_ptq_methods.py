"""Every post-training method keeps the same contract: one call, a copy, codes on the grid, a checkpoint that comes back."""

import pytest
import torch
from torch import nn

from hf_r2 import PTQ_METHODS, R2QuantConfig, quantize
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.layers import is_table
from hf_r2.packed_layers import encoded, packed_layers
from hf_r2.report import report
from tests.models import auto_class, float_model, inputs_for, logits

QUICK = {"adaround": {"iters": 4}, "cora": {"iters": 3, "budget": 0.2}, "pdquant": {"iters": 4, "start_iters": 2}}


def config_for(method, **settings):
    settings.setdefault("symmetric", method == "requant")
    options = {**QUICK.get(method, {}), **settings.pop("options", {})}
    if method in QUICK or method == "dfq":
        options["progress"] = False
    return R2QuantConfig(method, options=options, **settings)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("name", ["resnet", "bert"])
@pytest.mark.parametrize("method", PTQ_METHODS)
def test_contract(method, name, granularity, tmp_path):
    model, batches = float_model(name), [inputs_for(name)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    packed = quantize(model, config_for(method, weight_bits=3, act_bits=8, granularity=granularity), batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training and type(model) is type(packed)
    for key, layer in packed_layers(packed).items():
        e = encoded(layer)
        assert e.codes.max() < 8 and (e.scale is None or torch.isfinite(e.scale).all())
        assert e.scale is None or granularity == "per_channel" or e.scale.numel() == 1
        quantizer = layer._modules.get("input_quantizer")
        assert is_table(layer) == (quantizer is None), key
        assert quantizer is None or (quantizer.ready and not quantizer.dynamic and quantizer.grid.bits == 8)
    packed.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(packed, name))
    assert (logits(packed, name) - logits(model, name)).abs().max() > 0


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_eight_bits_stay_close(method):
    model = float_model("resnet")
    packed = quantize(model, config_for(method, weight_bits=8), [inputs_for("resnet")])
    off = (logits(packed, "resnet") - logits(model, "resnet")).norm() / logits(model, "resnet").norm()
    assert 0 < off < 0.05


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_are_on_their_grid_and_unsigned_after_a_relu(bits):
    batches = [inputs_for("resnet")]
    packed = quantize(float_model("resnet"), R2QuantConfig("mse", 8, act_bits=bits), batches)
    seen = {}
    for name, layer in packed_layers(packed).items():
        quantizer = layer.input_quantizer
        quantizer.register_forward_hook(lambda _, __, y, n=name: seen.__setitem__(n, y))
    with torch.no_grad():
        packed(**batches[0])
    for name, layer in packed_layers(packed).items():
        codes = seen[name] / layer.input_quantizer.scale + layer.input_quantizer.zero_point
        assert (codes - codes.round()).abs().max() < 1e-2 and codes.unique().numel() <= 2**bits
        if name != "resnet.embedder.embedder.convolution":  # every other one reads what a ReLU gave
            assert layer.input_quantizer.zero_point == 0 and codes.min() >= 0
    assert packed.resnet.embedder.embedder.convolution.input_quantizer.zero_point > 0


def test_batches_may_be_a_generator_and_labels_are_left_out():
    batch = {**inputs_for("resnet"), "labels": torch.tensor([0, 1])}
    one = quantize(float_model("resnet"), config_for("adaround"), (batch for _ in range(2)))
    two = quantize(float_model("resnet"), config_for("adaround"), [inputs_for("resnet")] * 2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", ["nearest", "adaround", "pdquant"])
def test_in_place_where_it_is_asked_for(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    packed = quantize(model, config_for(method), [{"input": torch.randn(2, 3, 6, 6)}], inplace=True)
    assert packed is model and set(packed_layers(model)) == {"0", "4"}


def test_first_and_last_layers():
    model, batches = float_model("mobilenet_v1"), [inputs_for("mobilenet_v1")]
    same = quantize(model, R2QuantConfig(weight_bits=3, act_bits=4), batches)
    assert report(same)["policy"] == "first and last layers at 3 bits, like the rest"
    official = quantize(model, R2QuantConfig(weight_bits=3, act_bits=4, first_last_bits=8), batches)
    said = report(official)
    assert said["policy"] == (
        "first layer (mobilenet_v1.conv_stem.convolution) at 8 bits, last (classifier) at 8, the rest at 3"
    )
    assert official.classifier.input_quantizer.grid.bits == 8
    assert official.mobilenet_v1.layer[3].convolution.input_quantizer.grid.bits == 4
    with pytest.raises(ValueError, match="first_last_bits must be an integer from 1 to 8, got 16"):
        R2QuantConfig(first_last_bits=16)


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_dead_channels_and_unusual_convolutions(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, groups=2), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randn(4, 4, 8, 8)
    model(x)
    model.eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] = 0  # constant, and the batch norm behind it has seen that
        model[1].running_mean[2], model[1].running_var[2] = model[0].bias[2], 0
        model[5].weight[3] = 0
        true = model(x)
        for granularity in ("per_channel", "per_tensor"):
            packed = quantize(model, config_for(method, weight_bits=6, granularity=granularity), [{"input": x}])
            assert (packed(x) - true).norm() < 0.5 * true.norm()


def test_static_inputs_without_batches_where_a_method_needs_them():
    with pytest.raises(ValueError, match="batches are needed: act_bits with static ranges"):
        quantize(float_model("resnet"), R2QuantConfig("mse", act_bits=8))
    packed = quantize(float_model("resnet"), R2QuantConfig("squant", act_bits=8, symmetric=False))
    ranged = [m for m in packed.modules() if isinstance(m, InputQuantizer)]
    assert {m.dynamic for m in ranged} == {True, False}


@pytest.mark.parametrize("method", ["dfq", "squant"])
def test_data_free_methods_quantize_while_loading(method, tmp_path):
    float_model("mobilenet_v2").save_pretrained(tmp_path)
    config = config_for(method, weight_bits=4)
    loaded = auto_class("mobilenet_v2").from_pretrained(tmp_path, quantization_config=config)
    direct = quantize(float_model("mobilenet_v2"), config)
    torch.testing.assert_close(logits(loaded, "mobilenet_v2"), logits(direct, "mobilenet_v2"), rtol=0, atol=0)
