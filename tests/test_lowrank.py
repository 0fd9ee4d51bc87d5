"""Factors of a weight: identities with two layers, cost, storage, ranks within a budget."""

import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from hf_r2.factor_layers import factor_layers
from hf_r2.lowrank import SIDES, LowRank, cheaper_side, fold, sides, unfold
from hf_r2.ptq.residual import Residual, equal_share, factorize, spend
from tests.reference.lowrank import folded_slowly

CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 8, 3, bias=False),
    "strided": nn.Conv2d(6, 8, (3, 5), stride=(2, 3), padding=(2, 1), bias=False),
    "dilated": nn.Conv2d(6, 8, 3, dilation=2, padding="same", padding_mode="reflect", bias=False),
    "grouped": nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "multiplied": nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False),
    "pointwise": nn.Conv2d(6, 8, 1, stride=2, bias=False),
    "narrow": nn.Conv2d(12, 2, 3, bias=False),
    "one_dimension": nn.Conv1d(6, 8, 3, stride=2, bias=False),
    "three_dimensions": nn.Conv3d(2, 4, 3, padding=1, groups=2, bias=False),
}


def inputs_of(layer):
    size = {nn.Conv1d: (11,), nn.Conv2d: (11, 12), nn.Conv3d: (5, 6, 7)}[type(layer)]
    return torch.randn(3, layer.in_channels, *size, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("kernel", SIDES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_two_convolutions_are_one_of_low_rank(name, kernel, rank):
    layer = CONVOLUTIONS[name].double()
    u, s, v = torch.linalg.svd(unfold(layer.weight.detach(), kernel), full_matrices=False)
    rank = min(rank or len(s), len(s))
    left, right = u[:, :rank] * s[:rank], v[:rank]
    x = inputs_of(layer)
    with torch.no_grad():
        two = factor_layers(layer, left, right, kernel)(x)
        one = torch.func.functional_call(layer, {"weight": fold(left @ right, kernel, layer.weight.shape)}, (x,))
        assert (two - one).abs().max() < 1e-10 and one.abs().max() > 0.1
        if rank == len(s):  # all of it: the layer itself
            assert (two - layer(x)).abs().max() < 1e-10


def test_two_linear_layers():
    layer = nn.Linear(7, 5, bias=False).double()
    found = factorize("fc", layer.weight.detach())
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        two = factor_layers(layer, *found.factors(found.full_rank), found.kernel)
        assert (two(x) - layer(x)).abs().max() < 1e-10 and layer(x).abs().max() > 0.1
        assert two[0].weight.shape == (5, 7) and two[1].weight.shape == (5, 5)


def test_layers_without_two_factors():
    with pytest.raises(TypeError, match=r"only linear layers and convolutions .* got Embedding"):
        factor_layers(nn.Embedding(4, 4), torch.zeros(4, 1), torch.zeros(1, 4), "right")
    with pytest.raises(ValueError, match=r"shapes \[4, 1\] and \[1, 4\] do not fit: needed are \[5, r\] and \[r, 7\]"):
        factor_layers(nn.Linear(7, 5), torch.zeros(4, 1), torch.zeros(1, 4), "right")


@pytest.mark.parametrize("kernel", SIDES)
def test_folding_against_a_slow_loop(kernel):
    shape = (3, 2, 2, 2)
    m, n = sides(shape, kernel)
    left, right = torch.randn(m, 2), torch.randn(2, n)
    torch.testing.assert_close(fold(left @ right, kernel, shape), folded_slowly(left, right, kernel, shape))
    weight = torch.randn(shape)
    assert torch.equal(fold(unfold(weight, kernel), kernel, shape), weight)


@pytest.mark.parametrize(
    ("shape", "kernel", "cost"),
    [
        ((8, 4, 3, 3), "right", 8 + 36),
        ((4, 8, 3, 3), "left", 36 + 8),
        ((5, 7), "right", 12),
        ((16, 1, 3, 3), "right", 16 + 9),  # depthwise
    ],
)
def test_the_cheaper_unfolding_is_taken(shape, kernel, cost):
    assert cheaper_side(shape) == kernel and sum(sides(shape, kernel)) == cost
    found = factorize("layer", torch.randn(shape))
    assert found.kernel == kernel and found.cost == cost


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (4, 8, 3, 3), (6, 9), (16, 1, 3, 3)])
def test_what_a_rank_leaves_is_the_rest_of_the_singular_values(shape):  # Eckart and Young
    weight = torch.randn(shape, dtype=torch.float64)
    found = factorize("layer", weight)
    errors = []
    for rank in range(found.full_rank + 1):
        left, right = found.factors(rank)
        errors.append((weight - fold(left @ right, found.kernel, shape)).square().sum())
        torch.testing.assert_close(errors[-1], found.values[rank:].square().sum(), rtol=1e-9, atol=1e-12)
        if rank:
            torch.testing.assert_close(left.square().sum(), right.square().sum())  # of equal size
    assert all(a > b for a, b in pairwise(errors))


def test_a_depthwise_kernel_has_the_rank_of_its_taps():
    found = factorize("depthwise", torch.randn(32, 1, 3, 3))
    assert found.full_rank == 9 and found.cost == 41


def test_residuals_that_are_none():
    assert factorize("layer", torch.zeros(4, 4)) is None
    low = factorize("layer", torch.randn(6, 2) @ torch.randn(2, 5))
    assert low.full_rank == 2
    with pytest.raises(ValueError, match="the residual of layer 'layer' holds NaN or infinity"):
        factorize("layer", torch.full((4, 4), float("nan")))


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (12, 5), (5, 12)])
def test_an_svd_that_does_not_converge(shape, monkeypatch, caplog):
    weight = torch.randn(shape, dtype=torch.float64)
    weight[0] = weight[1]  # a value of zero among the singular ones, for some shapes
    true = factorize("conv", weight)

    def fails(*_, **__):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with caplog.at_level(logging.WARNING):
        found = factorize("conv", weight)
    assert "the SVD of layer conv did not converge" in caplog.text
    torch.testing.assert_close(found.values[: true.full_rank], true.values, rtol=1e-7, atol=1e-7)
    for rank in (1, true.full_rank):
        one, other = (fold(torch.mm(*f.factors(rank)), true.kernel, shape) for f in (found, true))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(
        ValueError, match=r"the residual of layer 'conv' cannot be factorized: .* leave it out with skip"
    ):
        factorize("conv", weight)


def test_factors_in_few_bits():
    left, right = torch.randn(40, 6), torch.randn(6, 30)
    exact = left @ right
    half = LowRank.of(left, right, "right")
    assert half.left.dtype == torch.float16 and half.stored_bits() == 16 * 6 * 70
    torch.testing.assert_close(half.weight((40, 30)), exact, rtol=0, atol=2e-2)
    offs = []
    for bits in (8, 6, 4, 2):
        low = LowRank.of(left, right, "right", bits)
        assert low.stored_bits() == bits * 6 * 70 + 2 * 6 * 32 and low.rank == 6
        assert int(low.left.max()) < 2**bits and low.left.dtype == torch.uint8
        for stored, factor, dim in zip(low.factors(), (left, right), (0, 1), strict=True):
            step = factor.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((stored - factor).abs() <= step * 0.5001).all()
            torch.testing.assert_close(stored.abs().amax(dim), factor.abs().amax(dim))
        offs.append(float((low.weight((40, 30)) - exact).norm() / exact.norm()))
    assert offs[0] < 0.01 and offs == sorted(offs)


def test_factors_that_cannot_be_stored():
    for bits in (1, 9, 12, 32, 8.0, True, None):
        with pytest.raises(ValueError, match="adapter_bits must be an integer from 2 to 8, or 16"):
            LowRank.of(torch.ones(2, 1), torch.ones(1, 2), "right", bits)
    with pytest.raises(ValueError, match="float16 cannot"):
        LowRank.of(torch.full((2, 1), 1e6), torch.ones(1, 2), "right")


def residual(m, n, rank):
    return Residual("layer", "right", torch.zeros(m, rank), torch.ones(rank), torch.zeros(rank, n), m * n)


def test_equal_shares():
    found = equal_share([residual(10, 30, 10), residual(5, 5, 5)], 0.2)
    assert found == pytest.approx([0.2 * 300 / 40, 0.2 * 25 / 10])


@pytest.mark.parametrize("numbers", [0, 9, 10, 39, 57, 100, 333.3, 10_000])
@pytest.mark.parametrize("wanted", [[1.5, 0.5, 3.0], [0.0, 0.0, 1.0], [0.2, 0.1, 40.0]])
def test_the_budget_is_spent_and_not_exceeded(wanted, numbers):
    layers = [residual(10, 30, 10), residual(5, 5, 5), residual(8, 20, 8)]
    ranks = spend(wanted, layers, numbers)
    left = numbers - sum(rank * layer.cost for rank, layer in zip(ranks, layers, strict=True))
    assert left >= 0 and all(isinstance(rank, int) for rank in ranks)
    for rank, layer in zip(ranks, layers, strict=True):
        assert 0 <= rank <= layer.full_rank
        assert rank == layer.full_rank or layer.cost > left  # nothing more would fit


def test_ranks_keep_their_proportion():
    layers = [residual(10, 10, 10), residual(10, 10, 10)]
    assert spend([2.0, 4.0], layers, 120) == [2, 4]
    assert spend([20.0, 40.0], layers, 120) == [2, 4]
    assert spend([0.2, 0.4], layers, 120) == [2, 4]
    assert spend([3.0, 4.0], layers, 140) == [3, 4]
