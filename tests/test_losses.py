"""Range losses of tensors: golden values of ALGORITHMS 1.4, gradients, limits, invariants, edges."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_r2 import RANGE_LOSSES, l_inf, margin, soft_min_max
from hf_r2 import range_forms as forms
from hf_r2 import range_kernel as kernel
from tests.reference.range_loss import l_inf as slow_l_inf
from tests.reference.range_loss import margin as slow_margin
from tests.reference.range_loss import soft_min_max as slow

FIVE = [-2.0, -1.0, 0.0, 1.0, 3.0]


def double(values, grad=True):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(
    ("values", "alpha", "expected"),
    [
        ([-1, 1], 0.1, 1.104173407285871),  # 2 tanh(alpha) + exp(-alpha)
        ([-1, 1], 1.0, 1.891067753082972),
        ([-1, 1], 10.0, 2.000045391685148),
        ([0, 1], 0.1, 0.9547957929938395),
        ([0, 1], 2.0, 0.8969294391923774),
        (FIVE, 1.0, 4.405663586),
        (FIVE, 0.1, 1.493914426),
        (FIVE, 10.0, 4.999999994),
    ],
)
def test_golden_values(values, alpha, expected):
    assert soft_min_max(double(values), alpha).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("alpha", "gradient", "slope"),
    [
        (1.0, [-0.998698941, -0.163053719, -0.023303259, -0.016106898, 1.201162818], 1.342169572),
        (0.1, [-0.174192035, -0.094175744, -0.016054428, 0.061745651, 0.222676555], 4.927743797),
    ],
)
def test_golden_gradients(alpha, gradient, slope):
    w, a = double(FIVE), double(alpha)
    soft_min_max(w, a).backward()
    torch.testing.assert_close(w.grad, double(gradient, False), rtol=0, atol=1e-9)
    assert a.grad.item() == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("size", [7, kernel.SMALL, kernel.SMALL + 1, kernel.CHUNK + 5])
@pytest.mark.parametrize("alpha", [0.1, 3.0, 40.0])
def test_every_path_equals_the_formula_left_to_autograd(size, alpha):
    results = []
    for function in (soft_min_max, slow):
        torch.manual_seed(1)
        w, a = torch.randn(size, dtype=torch.float64).mul(2).requires_grad_(), double(alpha)
        value = function(w, a)
        results.append((value, *torch.autograd.grad(3 * value, (w, a))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert abs(results[0][1].sum().item()) < 1e-9  # shifting all weights changes nothing


def test_overflow_takes_the_shifted_path():
    w = torch.linspace(-50, 50, kernel.SMALL + 100).requires_grad_()  # exp(10 * 50) is far outside float32
    value = soft_min_max(w, 10.0)
    value.backward()
    wide = w.detach().double().requires_grad_()
    expected = slow(wide, double(10.0))
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(w.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)  # 1 + alpha (w - s_max) cancels


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: values read by the host, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [7, kernel.CHUNK + 5])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", sorted(RANGE_LOSSES))
@pytest.mark.parametrize("into_grad", [False, True])
def test_the_way_of_other_devices_waits_for_nothing(monkeypatch, size, count, name, into_grad):
    # what a GPU runs: no Python floats, no look at the sums, each side shifted by its extreme
    monkeypatch.setattr(kernel, "readable", lambda device: False)
    monkeypatch.setattr(forms, "readable", lambda device: False)
    weights = [torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    scalars, way = double([0.1, 2.0, 40.0][:count]), kernel.Way(into_grad=into_grad)
    reference = {"soft_min_max": slow, "margin": slow_margin, "l_inf": lambda w, a: slow_l_inf(w)}[name]
    with NoWaiting():
        if name == "l_inf":
            losses = kernel.magnitudes(weights, way)
        else:
            losses = {"soft_min_max": kernel.soft_ranges, "margin": kernel.excesses}[name](weights, scalars, way)
        losses.sum().backward()
    ours = [w.grad for w in weights]
    copies, again = [w.detach().clone().requires_grad_() for w in weights], double(scalars.tolist())
    sum(reference(w, a) for w, a in zip(copies, again, strict=True)).backward()
    torch.testing.assert_close(ours, [w.grad for w in copies], rtol=1e-10, atol=1e-13)
    if name != "l_inf":
        offset = torch.exp(-scalars.detach()) if name == "soft_min_max" else 0
        torch.testing.assert_close(scalars.grad - offset, again.grad, rtol=1e-10, atol=1e-13)


def test_a_weight_in_another_memory_format():
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    soft_min_max(w, 1.0).backward()
    copy = w.detach().contiguous().requires_grad_()
    soft_min_max(copy, 1.0).backward()
    torch.testing.assert_close(w.grad, copy.grad)


def test_many_weights_of_equal_shape_are_each_by_themselves():
    weights = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    alphas = double([0.1, 0.5, 1.0, 2.0, 5.0])
    ranges = kernel.soft_ranges(weights, alphas)
    for w, alpha, value in zip(weights, alphas, ranges, strict=True):
        torch.testing.assert_close(value, slow(w, alpha) - torch.exp(-alpha))
    pulls = double([1.0, 2.0, 3.0, 4.0, 5.0], False)
    (ranges * pulls).sum().backward()
    for w, alpha, pull in zip(weights, alphas.detach(), pulls, strict=True):
        copy = w.detach().clone().requires_grad_()
        (pull * slow(copy, alpha)).backward()
        torch.testing.assert_close(w.grad, copy.grad)


def test_finite_differences():
    w, a = torch.randn(9, dtype=torch.float64, requires_grad=True), double(0.7)
    step = 1e-6
    soft_min_max(w, a).backward()
    for i in range(9):
        shift = torch.zeros_like(w).detach()
        shift[i] = step
        numeric = (slow(w + shift, a) - slow(w - shift, a)) / (2 * step)
        assert w.grad[i].item() == pytest.approx(numeric.item(), abs=1e-8)


def test_limits_bounds_and_scale():
    w = torch.randn(300, dtype=torch.float64)
    assert soft_min_max(w, 2000.0).item() == pytest.approx((w.max() - w.min()).item(), rel=1e-6)
    assert soft_min_max(w, 1e-9).item() == pytest.approx(1.0, abs=1e-8)
    for alpha in (0.1, 1.0, 10.0):
        width = soft_min_max(w, alpha).item() - math.exp(-alpha)
        assert 0 <= width <= (w.max() - w.min()).item()
        assert soft_min_max(5 * w, alpha / 5).item() - math.exp(-alpha / 5) == pytest.approx(5 * width, rel=1e-10)


def test_l_inf_pulls_the_largest_weight_alone():
    w = double([0.3, -2.5, 1.0])
    loss = l_inf(w)
    loss.backward()
    assert loss.item() == 2.5
    assert w.grad.tolist() == [0, -1, 0]


def test_margin_golden_and_minimum():
    u = double([0.2, -0.9, 0.5, 1.7, -2.3])
    m = double(1.0)
    loss = margin(u, m)  # 1 + (.7 + 1.3)
    loss.backward()
    assert loss.item() == pytest.approx(3.0)
    assert u.grad.tolist() == [0, 0, 0, 1, -1]
    assert m.grad.item() == -1  # 1 - two that stick out
    for size in (1.7, 2.0, 2.3):  # the minimum over m is max |u|, anywhere between the two largest magnitudes
        assert margin(u, size).item() == pytest.approx(2.3)
        assert margin(u, -size).item() == pytest.approx(2.3)
    assert margin(u, 1.6).item() > 2.3
    assert margin(u, 2.4).item() > 2.3


def test_vectors_of_dim_sum_their_coordinates():
    # output channels along axis 0: [2, 3] transposed is [[0, 5], [1, -1], [2, 8]], pairs (0,5) (1,-1) (2,8)
    w = double([[0.0, 1.0, 2.0], [5.0, -1.0, 8.0]])
    expected = (
        slow(double([0.0, 1.0, 2.0]), double(0.3)) + slow(double([5.0, -1.0, 8.0]), double(0.3)) - math.exp(-0.3)
    )
    assert soft_min_max(w, 0.3, dim=2).item() == pytest.approx(expected.item(), abs=1e-12)
    rest = torch.cat([w.detach(), double([[7.0, 7.0, 7.0]], False)])  # 9 weights: the ninth is left out
    assert torch.isfinite(soft_min_max(rest, 0.3, dim=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(RANGE_LOSSES))
def test_half_precision_is_reduced_in_float32(name, dtype):
    w = (torch.randn(5000) * 0.05).to(dtype).requires_grad_()
    scalar = {"soft_min_max": (0.5,), "margin": (0.01,), "l_inf": ()}[name]
    value = RANGE_LOSSES[name].function(w, *scalar)
    value.backward()
    wide = w.detach().float().requires_grad_()
    expected = RANGE_LOSSES[name].function(wide, *scalar)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    assert w.grad.dtype == dtype


@pytest.mark.parametrize("name", sorted(RANGE_LOSSES))
def test_empty_and_constant_weights(name):
    scalar = {"soft_min_max": (0.5,), "margin": (0.0,), "l_inf": ()}[name]
    function = RANGE_LOSSES[name].function
    offset = math.exp(-0.5) if name == "soft_min_max" else 0.0
    assert float(function(torch.empty(0, 4), *scalar)) == pytest.approx(offset)
    w = torch.zeros(3, 3, requires_grad=True)
    value = function(w, *scalar)
    value.backward()
    assert value.item() == pytest.approx(offset)
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        soft_min_max(torch.ones(3), alpha)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        soft_min_max(torch.ones(3), torch.tensor(alpha))


@pytest.mark.parametrize("name", sorted(RANGE_LOSSES))
def test_gradients_pass_gradcheck(name):
    # distinct magnitudes, none at the margin, so that finite differences see no kink
    w = double([[0.3, -2.5, 1.0], [0.7, 2.0, -1.4]])
    scalar = {"soft_min_max": (double(0.7),), "margin": (double(-1.1),), "l_inf": ()}[name]
    assert torch.autograd.gradcheck(RANGE_LOSSES[name].function, (w, *scalar), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(RANGE_LOSSES))
def test_second_backward_adds_the_same_gradient(name):
    w = torch.randn(50, dtype=torch.float64, requires_grad=True)
    loss = RANGE_LOSSES[name].function(w, *{"soft_min_max": (1.0,), "margin": (0.5,), "l_inf": ()}[name])
    (3 * loss).backward(retain_graph=True)
    first = w.grad.clone()
    loss.backward()
    assert first.abs().sum() > 0
    torch.testing.assert_close(w.grad, first * 4 / 3)


@pytest.mark.parametrize("name", ["l_inf", "margin"])
@pytest.mark.parametrize("size", [7, kernel.SMALL + 1, kernel.CHUNK + 5])
def test_pieces_of_l_inf_and_margin_equal_the_formula(name, size):
    results = []
    for function in (RANGE_LOSSES[name].function, {"l_inf": slow_l_inf, "margin": slow_margin}[name]):
        torch.manual_seed(1)
        w, m = torch.randn(size, dtype=torch.float64).requires_grad_(), double(1.5)
        value = function(w, *((m,) if name == "margin" else ()))
        results.append((value, *torch.autograd.grad(3 * value, (w, m) if name == "margin" else (w,))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_equal_largest_weights_share_the_gradient():
    w = double([2.0, -2.0, 1.0])
    l_inf(w).backward()
    assert w.grad.tolist() == [0.5, -0.5, 0]


def test_a_margin_of_zero_grows_again():
    m = double(0.0)
    margin(double([1.0, -2.0, 3.0]), m).backward()
    assert m.grad.item() == -2  # 1 - three that stick out; abs() would give 0 and stay there


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [10, kernel.SMALL + 1])
def test_a_broken_weight_gives_a_broken_loss(value, size):
    w = torch.randn(size)
    w[3] = value
    assert math.isnan(soft_min_max(w, 0.5).item())
    assert not math.isfinite(l_inf(w).item())
    assert not math.isfinite(margin(w, 0.5).item())


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("numel", [2, 30, 3000])
def test_no_pull_is_larger_than_its_bound(alpha, numel):
    for exponent in (1, 5):  # the odd powers of a Gaussian: light and heavy tails
        w = torch.randn(numel, dtype=torch.float64).pow(exponent).requires_grad_()
        soft_min_max(w, alpha).backward()
        assert w.grad.abs().max().item() <= 1.25 + math.log(numel) / 4


def test_a_frozen_weight_gets_no_gradient_beside_a_trained_one():
    frozen, trained = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    kernel.soft_ranges([frozen, trained], torch.ones(2)).sum().backward()
    assert frozen.grad is None
    assert trained.grad.abs().sum() > 0
