"""AdaRound: its formulas, brute force on few weights, the forms of the error, and the road through `quantize`."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.encoders.affine import Affine
from hf_r2.packed_layers import encoded, packed_layers
from hf_r2.ptq.layer_error import Calls, Gram, Rows, unfolds
from hf_r2.ptq.learn_layer import RoundingSettings, learn_rounding
from hf_r2.ptq.rounding import Rounding, annealed_beta, rectified_sigmoid, regularizer, start
from hf_r2.spec import LayerSpec
from tests.models import auto_class, float_model, inputs_for, logits

SETTINGS = RoundingSettings(
    iters=300, lr=0.03, weight_round=0.01, beta=(20.0, 2.0), warmup=0.2, activation=True, correct_bias=False, rows=256, seed=0
)  # fmt: skip


def test_rectified_sigmoid_and_regularizer():
    v = torch.tensor([-3.0, -1, 0, 1, 3], dtype=torch.float64, requires_grad=True)
    h = rectified_sigmoid(v)
    torch.testing.assert_close(h, torch.tensor([0, 0.22273, 0.5, 0.77727, 1], dtype=torch.float64), atol=5e-6, rtol=0)
    assert regularizer(h, 20).item() == pytest.approx(2.9999848749514126, abs=1e-12)
    assert regularizer(h, 2).item() == pytest.approx(2.3849694709418707, abs=1e-12)
    regularizer(h, 2).backward()
    assert v.grad.tolist() == pytest.approx([0, 0.523341, 0, -0.523341, 0], abs=1e-6)


def test_start_and_saturation():
    r = torch.tensor([0, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    assert start(r).tolist() == pytest.approx([-2.397895, -1.609438, 0, 1.609438, 2.387035], abs=1e-6)
    torch.testing.assert_close(rectified_sigmoid(start(r)), r, atol=1e-12, rtol=0)
    for v, slope in ((math.log(11) - 1e-3, True), (math.log(11) + 1e-3, False), (-math.log(11) - 1e-3, False)):
        x = torch.tensor(v, requires_grad=True)
        rectified_sigmoid(x).backward()
        assert (x.grad > 0) == slope


def test_annealing():
    assert annealed_beta(0.1, (20, 2), 0.2) is None
    assert annealed_beta(0.2, (20, 2), 0.2) == 20
    assert annealed_beta(0.6, (20, 2), 0.2) == pytest.approx(11)
    assert annealed_beta(1.0, (20, 2), 0.2) == 2


def _rounding(weight, bits=4, symmetric=True, granularity="per_channel"):
    encoder = Affine(weight, LayerSpec(weight_bits=bits, symmetric=symmetric, granularity=granularity))
    return Rounding(weight, encoder), encoder


def test_training_starts_at_the_float_weight_and_ends_one_code_from_the_floor():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    rounding, encoder = _rounding(weight, symmetric=False)
    position = weight / encoder.scale + encoder.zero_point
    inside = (position >= 0) & (position <= 15)  # rounding the zero point shifts the range by up to half a step
    assert inside.float().mean() > 0.85
    torch.testing.assert_close(rounding.soft()[inside], weight[inside], atol=1e-5, rtol=0)
    rounding.v.data.normal_()
    step = rounding.codes() - position.floor()
    assert set(step[position.floor() < 15].flatten().tolist()) == {0.0, 1.0}
    encoder.set_range_(encoder.scale * 0 - 0.5, encoder.scale * 0 + 0.5)
    rounding = Rounding(weight, encoder)
    rounding.soft().sum().backward()
    clipped = (weight > 0.6) | (weight < -0.6)
    assert rounding.v.grad[clipped].eq(0).all() and rounding.v.grad[weight.abs() < 0.4].gt(0).any()


def _problem(layer, f=None, correct_bias=False, n=400):
    torch.manual_seed(1)
    x = torch.randn(n, layer.in_features) / 3 + torch.randn(n, 1) + 0.5  # inputs that go together
    x_hat = x + 0.1 * torch.randn_like(x)
    problems = Rows(layer, f, correct_bias), Gram(layer, correct_bias)
    for problem in problems:
        problem.add(x, x_hat, layer.weight, 1)
        problem.close()
    return x, x_hat, *problems


@pytest.mark.parametrize("correct_bias", [False, True])
def test_both_forms_are_the_mean_squared_error(correct_bias):
    layer = nn.Linear(7, 5)
    x, x_hat, rows, gram = _problem(layer, correct_bias=correct_bias)
    other = layer.weight.detach() + 0.05 * torch.randn(5, 7)
    bias = layer.bias.detach()
    if correct_bias:
        bias = (layer(x) - x_hat @ other.T).mean(0).detach()
        torch.testing.assert_close(rows.corrected_bias(other), bias, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gram.corrected_bias(other), bias, atol=1e-5, rtol=1e-4)
    true = (layer(x) - x_hat @ other.T - bias).square().sum(1).mean().item()
    assert rows.error(other) == pytest.approx(true, rel=1e-4)
    assert gram.error(other) == pytest.approx(true, rel=1e-3)
    assert gram.loss(other).item() == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("f", [None, torch.relu])
def test_finds_what_brute_force_finds(f):
    torch.manual_seed(0)
    layer = nn.Linear(10, 1)
    _, _, rows, gram = _problem(layer, f)
    problem = rows if f else gram
    weight = layer.weight.detach()
    rounding, encoder = _rounding(weight, bits=3)
    floor = rounding.floor.clamp(1, 7)
    every = {}
    for up in itertools.product((0, 1), repeat=10):
        codes = (floor + torch.tensor(up)[None]).clamp(1, 7)
        every[up] = problem.error((codes - encoder.zero_point) * encoder.scale)
    learned = learn_rounding(weight, encoder, problem, replace(SETTINGS, iters=1000, weight_round=1e-3))
    nearest = problem.error(encoder.encode(weight).decode())
    encoder.set_codes_(learned.codes())
    found = problem.error(encoder.encode(weight).decode())
    ranked = sorted(every.values())
    assert found <= ranked[20] and found < 0.7 * nearest  # among the best 2 % of all 1,024 roundings
    assert regularizer(rectified_sigmoid(learned.v), 2) < 1  # all but one are decided, or nearly so


def test_white_inputs_leave_the_nearest():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    problem = Gram(layer)
    x = torch.linalg.qr(torch.randn(512, 8))[0] * 512**0.5
    problem.add(x, x, layer.weight, 1)
    problem.close()
    torch.testing.assert_close(problem.h[0], torch.eye(8), atol=1e-4, rtol=0)
    _, encoder = _rounding(layer.weight.detach(), bits=3)
    nearest = encoder.encode(layer.weight).codes
    learned = learn_rounding(layer.weight.detach(), encoder, problem, SETTINGS)
    off = (layer.weight.detach() / encoder.scale + encoder.zero_point).frac().abs()
    clear = (off - 0.5).abs() > 0.1  # a weight in the middle costs the same either way
    assert (learned.codes() == nearest)[clear].all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2, padding=(1, 2)),
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 6, (1, 3), padding="valid"),
        nn.ConvTranspose2d(4, 6, 3, stride=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.Conv3d(4, 6, 2), nn.Linear(5, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("f", [None, torch.relu])
def test_every_kind_of_layer(layer, f):
    torch.manual_seed(0)
    layer.reset_parameters()
    shape = {nn.Conv1d: (2, 4, 99), nn.Conv3d: (2, 4, 5, 5, 5), nn.Linear: (30, 7, 5)}.get(type(layer), (2, 4, 9, 9))
    x = torch.randn(shape)
    x_hat, other = x + 0.1 * torch.randn(shape), layer.weight.detach() * 1.1
    problem = Calls(layer, f) if not unfolds(layer) else Gram(layer) if f is None else Rows(layer, f)
    problem.add(x, x_hat, layer.weight.detach(), 1)
    problem.close()
    axis = -1 if isinstance(layer, nn.Linear) else 1
    act = f or (lambda y: y)
    out = torch.func.functional_call(layer, {"weight": other}, (x_hat,))
    true = (act(layer(x)) - act(out)).square().sum(axis).mean().item()
    assert problem.error(other) == pytest.approx(true, rel=2e-3)
    loss = problem.loss(other.requires_grad_(), 10**6, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == pytest.approx(true, rel=0.5) and other.grad.abs().max() > 0


def _batches(name, count=4):
    inputs = inputs_for(name)
    if "pixel_values" in inputs:
        g = torch.Generator().manual_seed(5)
        return [{"pixel_values": torch.randn(inputs["pixel_values"].shape, generator=g)} for _ in range(count)]
    return [{k: (v.roll(i, 1) if k == "input_ids" else v) for k, v in inputs.items()} for i in range(count)]


def _config(**options):
    options = {"iters": 60, "progress": False, **options}
    return R2QuantConfig("adaround", 3, act_bits=8, options=options)


@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet", "bert", "marian", "vit", "mobilebert", "gpt2"])
def test_models_are_rounded_saved_and_loaded(name, tmp_path, caplog):
    model, batches = float_model(name), _batches(name)
    caplog.set_level("INFO", "hf_r2.ptq.adaround")
    packed = quantize(model, _config(), batches)
    improved = 0
    for message in (r.getMessage() for r in caplog.records if "output error" in r.getMessage()):
        before, after = (float(part.split()[0]) for part in (message.split("error ")[1], message.split(", ")[2]))
        assert after <= before
        improved += after < before
    assert improved > 0
    packed.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(packed, name))


def test_deterministic_and_the_seed_counts():
    model, batches = float_model("resnet"), _batches("resnet")
    one, two, three = (quantize(model, _config(seed=seed), batches).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], three[key]) for key in one)


def test_options_change_the_result():
    model, batches = float_model("mobilenet_v1"), _batches("mobilenet_v1")
    plain = quantize(model, _config(), batches).state_dict()
    for change in (
        {"activation": False},
        {"correct_bias": False},
        {"weight_round": 1.0},
        {"lr": 0.003},
        {"rows": 8},
        {"samples": 3},
    ):
        other = quantize(model, _config(**change), batches).state_dict()
        assert any(not torch.equal(plain[key], other[key]) for key in plain), change


@pytest.mark.parametrize("bits, corrected", [(8, False), (7, True)])
def test_biases_are_corrected_below_eight_bits_unless_told(bits, corrected):
    model, batches = float_model("resnet"), _batches("resnet")
    default, yes, no = (
        quantize(
            model, R2QuantConfig("adaround", bits, options={"iters": 5, "progress": False, **options}), batches
        ).state_dict()
        for options in ({}, {"correct_bias": True}, {"correct_bias": False})
    )
    assert any(not torch.equal(yes[key], no[key]) for key in yes)
    expected = yes if corrected else no
    assert all(torch.equal(default[key], expected[key]) for key in default)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    import hf_r2.ptq.adaround as module

    model, batches = float_model("resnet"), _batches("resnet")
    whole = quantize(model, _config(), batches).state_dict()
    learn, calls = module.learn_rounding, []

    def stop_after_three(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(module, "learn_rounding", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, _config(resume_dir=str(tmp_path)), batches)
    again = quantize(model, _config(resume_dir=str(tmp_path)), batches).state_dict()
    assert len(calls) == 4 + 7 - 3  # three of the seven layers were not learned again
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    before = len(list(tmp_path.iterdir()))
    quantize(model, _config(resume_dir=str(tmp_path), seed=3, iters=1), batches)
    assert len(list(tmp_path.iterdir())) == before + 7  # notes of other settings are not read


def test_bad_batches():
    model, good = float_model("resnet"), _batches("resnet")
    with pytest.raises(ValueError, match="batches are needed: method 'adaround' reads the inputs of the layers"):
        quantize(model, _config())
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(model, _config(), [])
    with pytest.raises(ValueError, match=r"batch 1 \(keys pixel_values\) was rejected by the model"):
        quantize(model, _config(), [good[0], {"pixel_values": torch.randn(2, 5, 16, 16)}])
    with pytest.raises(ValueError, match=r"batch 1 \(keys pixels\) was rejected"):
        quantize(model, _config(), [good[0], {"pixels": good[0]["pixel_values"]}])
    with pytest.raises(ValueError, match=r"batch 1 \(keys pixel_values\) was rejected"):
        quantize(model, _config(), [good[0], {"pixel_values": good[0]["pixel_values"].long()}])
    with pytest.raises(ValueError, match="batch 1 holds NaN or infinity in 'pixel_values'"):
        quantize(model, _config(), [good[0], {"pixel_values": good[0]["pixel_values"] * math.nan}])


def test_shapes_of_codes_and_ranges():
    packed = quantize(float_model("resnet"), _config(iters=2), _batches("resnet"))
    for name, layer in packed_layers(packed).items():
        assert encoded(layer).codes.shape == float_model("resnet").get_submodule(name).weight.shape
