"""Ranges of least error and of quantiles, for weights and for inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2 import R2QuantConfig, quantize
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.grid import Grid, observed_range, scale_and_zero_point
from hf_r2.packed_layers import encoded, packed_layers
from hf_r2.ranges import error, mse_range, percentile_range
from tests.models import float_model, logits
from tests.reference.ranges import least_error, mean_error
from tests.test_requant import gaussian


@pytest.mark.parametrize(
    ("bits", "clip", "mse"), [(2, 1.2240, 0.1899510), (3, 1.9514, 0.04669487), (4, 2.47, 0.01276576)]
)
def test_least_squares_of_a_gaussian(bits, clip, mse):
    x, grid = gaussian().float(), Grid(bits)
    low, high = mse_range(x, grid, None, p=2)
    assert high.item() == pytest.approx(clip, abs=3.668 / 100) and low == -high  # the candidates are 1 % apart
    assert error(x, low, high, grid, None).item() == pytest.approx(mse, rel=5e-3)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, 0, 1]),
    st.sampled_from(["1d", "auto"]),
)
def test_never_worse_than_minimum_and_maximum(seed, bits, symmetric, axis, search):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)).pow(3) + 0.1 * (seed % 7)
    grid = Grid(bits, symmetric)
    best = error(x, *mse_range(x, grid, axis, p=2, search=search), grid, axis)
    assert (best <= error(x, *observed_range(x, grid, axis), grid, axis)).all()


def test_two_ends_of_their_own_are_better_for_lopsided_values():
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) / 2 + 2, torch.tensor([-6.0])])
    grid = Grid(3, symmetric=False)
    one, two = (error(x, *mse_range(x, grid, None, p=2, search=s), grid, None) for s in ("1d", "2d"))
    assert two < 0.9 * one
    wider = mse_range(x, grid, None, p=8)  # a higher power minds the outlier more
    assert wider[0] < mse_range(x, grid, None, p=2)[0]


@pytest.mark.parametrize(
    ("bits", "symmetric", "search"),
    [(2, True, "1d"), (3, False, "1d"), (2, False, "2d"), (3, False, "2d"), (3, False, "auto")],
)
@pytest.mark.parametrize("p", [2, 2.4])
def test_finds_what_a_loop_over_every_candidate_finds(bits, symmetric, search, p):
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    x[0] = torch.cat([x[0, 1:].abs() + 1, torch.tensor([-0.01])])  # best without negative levels: zero point 0
    x[1] = -x[0]  # without positive ones: the last zero point
    low, high = mse_range(x, Grid(bits, symmetric), 0, p=p, search=search)
    for row, start, end in zip(x.tolist(), low.flatten().tolist(), high.flatten().tolist(), strict=True):
        least = least_error(row, bits, symmetric, p, "2d" if search == "auto" else search)
        assert mean_error(row, start, end, bits, symmetric, p) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize(
    ("bits", "positive", "takes"), [(2, False, "2d"), (4, False, "2d"), (5, False, "1d"), (4, True, "1d")]
)
def test_auto_takes_two_dimensions_for_few_levels_over_both_signs(bits, positive, takes):
    x = torch.randn(300, generator=torch.Generator().manual_seed(2)) + 0.7
    x, grid = x.abs() if positive else x, Grid(bits, symmetric=False)
    ranges = {search: torch.cat(mse_range(x, grid, None, search=search)) for search in ("auto", "1d", "2d")}
    assert torch.equal(ranges["auto"], ranges[takes])
    assert positive or not torch.equal(ranges["1d"], ranges["2d"])  # or the choice would not show


def test_percentiles_by_rank():
    x = torch.arange(-1000, 1001).float()
    low, high = percentile_range(x, Grid(8, symmetric=False), None, percentile=0.999)
    assert (low.item(), high.item()) == (-998, 998)  # 2 of the 2001 values cut at each end
    low, high = percentile_range(x, Grid(8), None, percentile=0.999)
    assert (low.item(), high.item()) == (-999, 999)  # 2 of the 2001 magnitudes
    rows = torch.stack([x, 2 * x])
    assert percentile_range(rows, Grid(8), 0, percentile=0.999)[1].flatten().tolist() == [999, 1998]
    assert percentile_range(rows.t(), Grid(8), 1, percentile=0.999)[1].flatten().tolist() == [999, 1998]


@pytest.mark.parametrize("numel", [1, 2, 9, 999])
def test_small_tensors_keep_their_whole_range(numel):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    for grid in (Grid(4), Grid(4, symmetric=False)):
        low, high = percentile_range(x, grid, None, percentile=0.999)
        assert torch.maximum(low.abs(), high.abs()) == x.abs().max()


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(3), torch.full((4,), -2.5), torch.tensor([1e-30, -1e-30])])
@pytest.mark.parametrize("search", [mse_range, percentile_range])
def test_degenerate_values_give_finite_ranges(x, search):
    for grid in (Grid(1), Grid(4), Grid(4, symmetric=False)):
        low, high = search(x, grid, None)
        assert torch.isfinite(low) and torch.isfinite(high) and low <= high


@pytest.mark.parametrize("search", [mse_range, percentile_range])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("grid", [Grid(1), Grid(4), Grid(4, symmetric=False)], ids=str)
def test_values_that_are_not_finite_count_as_zero(search, bad, grid):
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    x[1, 7], zeroed = bad, x.clone()
    zeroed[1, 7] = 0
    for axis in (0, None):
        for end, other in zip(search(x, grid, axis), search(zeroed, grid, axis), strict=True):
            assert torch.isfinite(end).all() and torch.equal(end, other)
    assert (search(torch.full((2, 4), bad), grid, 0)[1] == 0).all()


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, symmetric=False)], ids=str)
def test_a_quantile_of_sparse_values_is_no_range_of_nothing(grid):
    x = torch.zeros(2, 1000)
    x[0, :3] = torch.tensor([1.0, 0.3, -0.5])  # fewer than the 5 that a percentile of .995 cuts at each end
    x[1] = torch.linspace(-1, 1, 1000)
    low, high = percentile_range(x, grid, 0, percentile=0.995)
    assert low[0].item() == -0.5 and high[0].item() == 1
    assert -1 < low[1].item() < -0.98 and 0.98 < high[1].item() < 1
    assert torch.equal(percentile_range(x * 8, grid, 0, percentile=0.995)[1], high * 8)


def test_bad_arguments():
    x = torch.randn(10)
    with pytest.raises(ValueError, match="p must be positive, got 0"):
        mse_range(x, Grid(4), None, p=0)
    with pytest.raises(ValueError, match="search must be one of auto, 1d, 2d; got '3d'"):
        mse_range(x, Grid(4), None, search="3d")
    with pytest.raises(ValueError, match=r"percentile must be above 0.5 and at most 1, got 99.9"):
        percentile_range(x, Grid(4), None, percentile=99.9)


@pytest.mark.parametrize("method", ["mse", "percentile"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_of_a_model(method, granularity):
    model = float_model("bert")
    options = {"p": 2} if method == "mse" else {"percentile": 0.9}
    packed = quantize(model, R2QuantConfig(method, 3, granularity, options=options))
    plain = quantize(model, R2QuantConfig("nearest", 3, granularity))
    smaller = 0
    for name, layer in packed_layers(packed).items():
        true, other = model.get_submodule(name).weight, packed_layers(plain)[name]
        if method == "mse":
            assert (layer.weight - true).square().mean() <= (other.weight - true).square().mean() * (1 + 1e-6)
        smaller += bool((layer.weight_scale < other.weight_scale).any())
        assert (layer.weight_scale <= other.weight_scale * (1 + 1e-6)).all()
    assert smaller >= 10


@pytest.mark.parametrize("p", [1.0, 6.0])
@pytest.mark.parametrize("search", ["1d", "2d"])
def test_options_reach_the_search(p, search):
    model, grid = float_model("bert"), Grid(3, symmetric=False)
    config = R2QuantConfig("mse", 3, symmetric=False, options={"p": p, "search": search}, skip=["*embeddings*"])
    packed = packed_layers(quantize(model, config))
    weights = [model.get_submodule(name).weight for name in packed]

    def chosen(**options):
        found = [scale_and_zero_point(*mse_range(w, grid, 0, **options), grid) for w in weights]
        return torch.cat([torch.stack(pair).flatten() for pair in found])

    layers = [encoded(layer) for layer in packed.values()]
    stored = torch.cat([torch.stack([e.scale, e.zero_point.float()]).flatten() for e in layers])
    assert torch.equal(stored, chosen(p=p, search=search))
    # Both options matter for these weights, so that losing one would be seen.
    assert not torch.equal(stored, chosen(search=search))
    assert not torch.equal(stored, chosen(p=p, search={"1d": "2d", "2d": "1d"}[search]))


@pytest.mark.parametrize("method", ["mse", "percentile", "requant"])
def test_one_bit_keeps_the_mean_magnitude(method):
    one, plain = (quantize(float_model("bert"), R2QuantConfig(m, 1)) for m in (method, "nearest"))
    assert torch.equal(logits(one, "bert"), logits(plain, "bert"))


def test_inputs_of_a_layer():
    quantizer = {rule: InputQuantizer(4) for rule in ("minmax", "mse", "percentile")}
    x = torch.cat([torch.randn(15_000, generator=torch.Generator().manual_seed(0)).relu(), torch.tensor([12.0])])
    top = {}
    for rule, q in quantizer.items():
        q.observing, q.ready = True, False
        assert torch.equal(q(x), x)
        assert q.finish(rule)
        top[rule] = (q.scale * (15 - q.zero_point)).item()
        assert q.zero_point == 0  # one-sided values: unsigned
    assert top["minmax"] == pytest.approx(12, rel=1e-6)
    assert 2 < top["mse"] < 8 and 3 < top["percentile"] < 6
    off = {rule: (q(x[:-1]) - x[:-1]).square().mean().item() for rule, q in quantizer.items()}
    assert off["mse"] < 0.5 * off["minmax"]
