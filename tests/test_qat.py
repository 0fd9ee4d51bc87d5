"""Trained quantizers: golden values and gradients of ALGORITHMS 4, closed forms, starts, limits, edges."""

import pytest
import torch
from torch import nn

from hf_r2.encoders import ENCODERS
from hf_r2.encoders.dorefa import DoReFa, dorefa_levels, dorefa_unit
from hf_r2.encoders.learned import learned_quantize
from hf_r2.encoders.lsq import LSQ
from hf_r2.encoders.trained_inputs import ClippedInput, LearnedStepInput, pact
from hf_r2.grid import Grid
from hf_r2.spec import LayerSpec

D = torch.float64


def gradients(function, *values):
    """Value, and the gradient of its plain sum for each argument."""
    leaves = [v.clone().requires_grad_() for v in values]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out.sum(), leaves)


def test_lsq_golden_values():
    v = torch.tensor([-0.9, -0.28, 0.06, 0.14, 0.26, 0.8], dtype=D)
    level, slopes = [], []
    for one in v:
        value, (dv, ds) = gradients(
            lambda x, s: learned_quantize(x, s, 2.0, 3, 1.0), one.view(1), torch.tensor([0.2], dtype=D)
        )
        level.append(value.item())
        slopes.append((dv.item(), ds.item()))
    torch.testing.assert_close(torch.tensor(level, dtype=D), torch.tensor([-0.4, -0.2, 0, 0.2, 0.2, 0.2], dtype=D))
    assert [dv for dv, _ in slopes] == [0, 1, 1, 1, 0, 0]
    expected = torch.tensor([-2, 0.4, -0.3, 0.3, 1, 1], dtype=D)
    torch.testing.assert_close(torch.tensor([ds for _, ds in slopes], dtype=D), expected, rtol=0, atol=1e-9)


def detached(x, scale, low, high, factor):
    """LSQ as its authors write it: straight-through rounding and a scaled gradient of the step."""
    scale = (scale - scale * factor).detach() + scale * factor
    u = (x / scale).clamp(low, high)
    return (u + (u.round() - u).detach()) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_lsq_gradients_are_those_of_the_straight_through_form(bits, granularity):
    w = torch.randn(6, 20, dtype=D)
    scale = (
        (0.3 + torch.rand(6, 1, dtype=D)) * 4 / 2**bits
        if granularity == "per_channel"
        else torch.full((1, 1), 2.2 / 2**bits, dtype=D)
    )
    pull, half = torch.randn_like(w), 2 ** (bits - 1)
    ours = gradients(lambda a, s: pull * learned_quantize(a, s, half, 2**bits - 1, 0.25), w, scale)
    theirs = gradients(lambda a, s: pull * detached(a, s, -half, half - 1, 0.25), w, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_lsq_starts_where_the_paper_does(bits, granularity):
    w = torch.randn(4, 50)
    encoder = LSQ(w, LayerSpec("lsq", bits, granularity))
    mean = w.abs().mean(1, keepdim=True) if granularity == "per_channel" else w.abs().mean().view(1, 1)
    top = max(2 ** (bits - 1) - 1, 1)
    torch.testing.assert_close(encoder.scale.detach(), 2 * mean / top**0.5)
    assert encoder.factor == pytest.approx((w.numel() / mean.numel() * top) ** -0.5)
    levels = encoder(w) / encoder.scale
    assert levels.min() >= (-(2 ** (bits - 1)) if bits > 1 else -0.5)
    assert levels.max() <= (2 ** (bits - 1) - 1 if bits > 1 else 0.5)
    if bits == 1:
        torch.testing.assert_close(encoder(w), torch.where(w > 0, 1.0, -1.0) * mean)


@pytest.mark.parametrize("method", ["lsq", "dorefa", "pact"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trained_forward_equals_what_is_packed_to_the_bit(method, bits, dtype):
    w = (torch.randn(8, 3, 3, 3) * 0.1).to(dtype).requires_grad_()
    encoder = ENCODERS[method].build(w, LayerSpec(method, bits))
    for mode in (True, False):
        value = encoder.train(mode)(w)
        assert value.dtype == dtype
        assert torch.equal(value, encoder.encode(w).decode().to(dtype))
    assert encoder.encode(w).bits == bits
    assert 1 < len(encoder.encode(w).codes.unique()) <= 2**bits


def test_dorefa_golden_values():
    w = torch.tensor([-2, -0.5, -0.1, 0.1, 0.5, 2.0])
    encoder = DoReFa(w, LayerSpec("dorefa", 2, options={"rescale": False}))
    torch.testing.assert_close(encoder(w), torch.tensor([-1, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1]))
    torch.testing.assert_close(DoReFa(w, LayerSpec("dorefa", 2))(w), torch.tanh(torch.tensor(2.0)) * encoder(w))
    sign = DoReFa(w, LayerSpec("dorefa", 1))
    torch.testing.assert_close(sign(w), torch.tensor([-1, -1, -1, 1, 1, 1]) * w.abs().mean())
    assert sign.encode(torch.zeros(2)).codes.tolist() == [1, 1]
    for bits in range(2, 9):
        assert (dorefa_levels(bits) != 0).all()
        torch.testing.assert_close(dorefa_levels(bits), -dorefa_levels(bits).flip(0))


def test_dorefa_gradient_passes_tanh_and_the_maximum():
    w, pull = torch.randn(30, dtype=D) * 0.8, torch.randn(30, dtype=D)
    top = w.abs().argmax()
    slope = 1 - torch.tanh(w).square()
    largest = torch.tanh(w).abs().max()
    expected = pull * slope / largest
    expected[top] -= (pull * torch.tanh(w)).sum() / largest**2 * torch.tanh(w[top]).sign() * slope[top]
    _, (found,) = gradients(lambda a: pull * dorefa_unit(a)[0], w)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wide = w.float().requires_grad_()
    encoder = DoReFa(wide, LayerSpec("dorefa", 3, options={"rescale": False}))
    (found,) = torch.autograd.grad((pull.float() * encoder(wide)).sum(), wide)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_pact_golden_values():
    x = torch.tensor([-1, 0.2, 0.6, 0.99, 1, 3], dtype=D)
    value, (dx, dclip) = gradients(
        lambda a, c: pact(a, c, 0.0, Grid(2, symmetric=False)), x, torch.tensor(1.0, dtype=D)
    )
    torch.testing.assert_close(value, torch.tensor([0, 1 / 3, 2 / 3, 1, 1, 1], dtype=D))
    assert dx.tolist() == [0, 1, 1, 1, 0, 0]
    assert dclip.item() == 2  # 1.71 if the rounding saw the clip


def test_two_sided_pact():
    x = torch.tensor([-3, -0.9, -0.2, 0.0, 0.3, 0.8, 5], dtype=D)
    clip = torch.tensor(1.0, dtype=D)
    value, (dx, dclip) = gradients(lambda a, c: pact(a, c, 4.0, Grid(3, symmetric=False)), x, clip)
    torch.testing.assert_close(value, torch.tensor([-1, -1, -0.25, 0, 0.25, 0.75, 0.75], dtype=D))
    assert dx.tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert dclip.item() == pytest.approx(-1 + 0.75 + 0.75)


def test_lsq_plus_gradients():
    quantizer = LearnedStepInput(LayerSpec("lsq", act_bits=4, options={"offset": True})).train()
    x = torch.nn.functional.silu(torch.randn(3, 400) * 3)
    with torch.no_grad():
        quantizer(x)
    assert quantizer.offset.item() < -0.05
    value = quantizer(x.requires_grad_())
    pull = torch.randn_like(value)
    dx, ds, db = torch.autograd.grad((pull * value).sum(), [x, quantizer.scale, quantizer.offset])
    u = (x.detach() - quantizer.offset.detach()) / quantizer.scale.detach()
    inside = (u > 0) & (u < 15)
    factor = (400 * 15) ** -0.5
    torch.testing.assert_close(dx, pull * inside)
    expected = torch.where(inside, u.round() - u, u.clamp(0, 15))
    torch.testing.assert_close(ds, (pull * expected).sum() * factor, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(db, (pull * ~inside).sum() * factor, rtol=1e-4, atol=1e-5)
    assert 0 < inside.float().mean() < 1


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa", "dkm"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_start_from_the_first_batch_and_settle_to_the_same(method, signed, bits):
    spec = LayerSpec(method, act_bits=bits)
    quantizer = ENCODERS[method].inputs(spec)
    x = torch.randn(4, 600) if signed else torch.randn(4, 600).abs()
    assert torch.equal(quantizer.eval()(x), x)  # no range yet: as in float
    with pytest.raises(ValueError, match="no batch has passed in training mode"):
        quantizer.settled()
    quantizer.train()(x)
    if method == "lsq":
        top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        torch.testing.assert_close(quantizer.scale.detach(), 2 * x.abs().mean() / top**0.5)
    if method == "pact":
        torch.testing.assert_close(quantizer.clip.detach(), x.abs().max())
    trained = quantizer(x).detach()
    assert quantizer.known == (2 if signed else 1)
    assert len(trained.unique()) <= 2**bits
    assert torch.equal(quantizer.eval()(x), trained)
    assert torch.equal(quantizer.settled()(x), trained)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    assert quantizer(torch.tensor([1, 2])).dtype == torch.int64


def test_a_step_that_turned_negative_comes_back():
    w = nn.Parameter(torch.randn(4, 8))
    encoder = LSQ(w, LayerSpec("lsq", 2, "per_tensor"))
    with torch.no_grad():
        encoder.scale.fill_(-0.3)
    assert encoder.encode(w).scale.item() > 0  # a checkpoint written just then is sound
    encoder(w)
    assert encoder.scale.item() > 0
    clip = ClippedInput(LayerSpec("pact", act_bits=4)).train()
    clip(torch.rand(5))
    with torch.no_grad():
        clip.clip.fill_(-1.0)
    assert torch.isfinite(clip(torch.rand(5))).all()
    assert clip.clip.item() > 0


def test_a_model_cast_to_half_precision_computes_in_float32():
    w = torch.zeros(4, 8)
    encoder = LSQ(w, LayerSpec("lsq", 2)).half()  # a step of 1e-8 is 0 in float16
    assert torch.equal(encoder(w.half()), w.half())
    fine = LSQ(torch.randn(4, 8), LayerSpec("lsq", 8)).half()
    w = torch.randn(4, 8).half().requires_grad_()
    value = fine(w)
    value.sum().backward()
    assert torch.equal(value, fine.encode(w).decode().half())
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("w", [torch.zeros(3, 4), torch.full((3, 4), 0.5), torch.empty(0, 4)])
@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_degenerate_weights_stay_finite(w, method):
    encoder = ENCODERS[method].build(w, LayerSpec(method, 2))
    w = w.clone().requires_grad_()
    value = encoder(w)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(w.grad).all()
    if method == "lsq" and w.numel() and not w.any():
        assert value.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lsq", {"offset": 1.5}, "offset must be true or false"),
        ("pact", {"clip": 0}, "clip must be a positive number, got 0"),
        ("pact", {"clip_decay": -1}, "clip_decay must be a number >= 0"),
        ("dorefa", {"clip": "wide"}, "clip must be a positive number, got 'wide'"),
        ("dorefa", {"rescale": "yes"}, "rescale must be true or false"),
    ],
)
def test_options_that_make_no_sense(method, options, message):
    with pytest.raises(ValueError, match=message):
        ENCODERS[method].options(**options)
