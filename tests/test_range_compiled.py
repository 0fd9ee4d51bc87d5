"""The compiled loops of the range loss agree with the others, and step aside where they cannot run."""

import math

import pytest
import torch
from torch import nn

from hf_r2 import RANGE_LOSSES, RangeLoss, losses, range_compiled
from hf_r2.range_compiled import add_compiled_, compiled_totals
from hf_r2.range_forms import SOFT_RANGE
from hf_r2.range_kernel import Way, excesses, soft_ranges
from tests.reference import range_loss as slow


@pytest.fixture
def small_groups(monkeypatch):
    """Two weights a call and one backend that only traces: the same functions, and no wait for a C++ compiler."""
    compile = torch.compile
    monkeypatch.setattr(range_compiled, "GROUP", 2)
    monkeypatch.setattr(losses, "compiler_found", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    range_compiled._compiled.cache_clear()
    yield
    range_compiled._compiled.cache_clear()


def weights_of(sizes, scale=1.0):
    return [torch.randn(n // 64, 64).mul(scale).requires_grad_() for n in sizes]


@pytest.mark.parametrize("kind", ["soft_min_max", "margin"])
@pytest.mark.parametrize("held", [True, False])
def test_loss_slope_and_gradient_equal_the_formula(small_groups, kind, held):
    weights = weights_of([1 << 12, 1 << 13, 1 << 12, 1 << 12, 1280 * 64])
    scalars, pulls = torch.tensor([2.0, 1.0, 1.5, 0.5, 1.0], requires_grad=True), [1.0, 3.0, -2.0, 0.5, 1.0]
    for w in weights:
        w.grad = torch.ones_like(w) if held else None
    function = soft_ranges if kind == "soft_min_max" else excesses
    losses = function(weights, scalars, Way(compiled=True, into_grad=held))
    (losses * torch.tensor(pulls)).sum().backward()
    for i, (w, scalar, pull) in enumerate(zip(weights, scalars.tolist(), pulls, strict=True)):
        wide, a = w.detach().double().requires_grad_(), torch.tensor(scalar, dtype=torch.float64, requires_grad=True)
        loss = slow.margin(wide, a) if kind == "margin" else slow.soft_min_max(wide, a) - torch.exp(-a)
        loss.backward()
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-6)
        assert scalars.grad[i].item() == pytest.approx(pull * a.grad.item(), rel=1e-5)
        torch.testing.assert_close(w.grad.double() - float(held), pull * wide.grad, rtol=0, atol=4e-7)


@pytest.mark.parametrize("kind", sorted(RANGE_LOSSES))
def test_the_model_s_loss_is_the_same_either_way(small_groups, kind):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 65), nn.Linear(3, 3), nn.Embedding(128, 64)
    )
    results = []
    for compiled in (False, True):
        loss = RangeLoss(model, kind, compiled=compiled)
        loss.scalars.data *= 30.0 if kind == "soft_min_max" else 0.5  # alpha 3; something sticks out
        assert loss.compiled is compiled
        model.zero_grad()
        value = loss(into_grad=True)
        (0.5 * value).backward()
        results.append([value, *(w.grad.clone() for w in loss.weights().values())])
        if kind == "margin":  # of soft_min_max it is a difference of moments, good to 5e-5 where float32 sums are long
            results[-1].append(loss.scalars.grad)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * ours.abs().max().item())


@pytest.mark.parametrize("alpha, bound", [(0.1, 1e-5), (1.0, 1e-6), (3.0, 1e-6), (30.0, 1e-6)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_million_weights_are_summed_exactly_either_way(small_groups, alpha, bound, compiled):
    """At alpha 0.1 the two softmaxes all but cancel, and what they share is lost in float32."""
    w = torch.randn(1024, 1024).mul(0.02).requires_grad_()
    wide = w.detach().double().requires_grad_()
    value = soft_ranges([w], torch.tensor([alpha]), Way(compiled))
    expected = slow.soft_min_max(wide, torch.tensor(alpha, dtype=torch.float64))
    value.sum().backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item() - math.exp(-alpha), rel=1e-6)
    torch.testing.assert_close(w.grad.double(), wide.grad, rtol=0, atol=bound * wide.grad.abs().max().item())


def test_what_cannot_be_compiled_is_left_to_the_other_way(small_groups):
    def handled(w, grad=None):
        return (
            [*compiled_totals(SOFT_RANGE, [1.0], [w])],
            [*add_compiled_(SOFT_RANGE, [1.0], [[0.0] * 4], [w], [grad], [0])],
        )

    (w,) = weights_of([1 << 12])
    assert handled(w) == ([0], [0])
    assert handled(w, torch.zeros_like(w)) == ([0], [0])
    assert handled(w, torch.zeros_like(w).T.contiguous().T) == ([0], [])
    assert handled(w.double()) == ([], [])
    assert handled(w[:-1]) == ([], [])  # no multiple of a line
    assert handled(w[:2]) == ([], [])  # too small


@pytest.mark.parametrize("value", [math.nan, 400.0])
def test_sums_that_overflow_are_made_again(small_groups, value):
    """e^400 in float32; a NaN."""
    weights = weights_of([1 << 12, 1 << 12])
    with torch.no_grad():
        weights[0][0, 0] = value
    results = []
    for compiled in (False, True):
        copies = [w.detach().clone().requires_grad_() for w in weights]
        losses = soft_ranges(copies, torch.ones(2), Way(compiled, into_grad=True))
        losses.sum().backward()
        results.append([losses.detach(), *(w.grad for w in copies)])
    assert math.isfinite(results[0][0][1]) and (value != value) == math.isnan(results[0][0][0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_compiler_that_fails_is_said_once_and_not_asked_again(monkeypatch, caplog):
    def broken(f, **options):
        def run(*args):
            raise RuntimeError("no compiler\nlong trace")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    range_compiled._compiled.cache_clear()
    (w,) = weights_of([1 << 12])
    for _ in range(2):
        assert compiled_totals(SOFT_RANGE, [1.0], [w]) == {}
    assert len(caplog.records) == 1 and "no compiler" in caplog.text and "long trace" not in caplog.text
    range_compiled._compiled.cache_clear()


def test_without_a_compiler_nothing_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert RangeLoss(nn.Linear(3, 3), compiled=True).compiled is False
