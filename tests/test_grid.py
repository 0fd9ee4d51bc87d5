"""Golden values, properties and edges of uniform grids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.grid import Grid, dequantize, fake_quantize, observed_range, quantize, scale_and_zero_point

EVERY_GRID = [Grid(bits, symmetric) for bits in range(1, 9) for symmetric in (True, False)]


def on_grid(w, grid, axis=None):
    scale, zero_point = scale_and_zero_point(*observed_range(w, grid, axis), grid)
    codes = quantize(w, scale, zero_point, grid)
    return codes, scale, zero_point, dequantize(codes, scale, zero_point)


def test_affine_golden():
    # range [-1, 2] in 15 steps of .2, zero at code 5; .68 / .2 = 3.4 rounds to 3
    codes, scale, zero_point, value = on_grid(torch.tensor([-1, -0.2, 0, 0.68, 2]), Grid(4, symmetric=False))
    assert codes.tolist() == [0, 4, 5, 8, 15]
    torch.testing.assert_close(scale, torch.tensor([0.2]))
    assert zero_point.item() == 5
    torch.testing.assert_close(value, torch.tensor([-1, -0.2, 0, 0.6, 2]))


def test_symmetric_golden():
    # max |w| = 2.1 over 7 steps: scale .3, zero at code 8; -1.0 / .3 = -3.33, 0.5 / .3 = 1.67
    codes, scale, zero_point, value = on_grid(torch.tensor([-1.0, 0.0, 0.5, 2.1]), Grid(4))
    torch.testing.assert_close(scale, torch.tensor([0.3]))
    assert zero_point.item() == 8
    assert codes.tolist() == [5, 8, 10, 15]
    torch.testing.assert_close(value, torch.tensor([-0.9, 0.0, 0.6, 2.1]))


def test_two_bits_symmetric_has_three_levels():
    codes, scale, *_ = on_grid(torch.tensor([-1.0, -0.2, 0.3, 0.9]), Grid(2))
    assert codes.tolist() == [1, 2, 2, 3]
    assert scale.item() == 1.0


def test_one_bit_symmetric_is_the_mean_magnitude():
    *_, value = on_grid(torch.tensor([-4.0, -1.0, 0.5, 2.5]), Grid(1))  # mean |w| = 2
    assert value.tolist() == [-2, -2, 2, 2]


def test_ties_go_to_even():
    one, zero = torch.tensor(1.0), torch.tensor(2.0)
    assert quantize(torch.tensor([0.5, 1.5, -0.5]), one, zero, Grid(3, symmetric=False)).tolist() == [2, 4, 2]


def test_pictures_in_minus_one_to_one_are_rounded_as_other_runtimes_do():
    # bytes k as k / 127.5 - 1 lie half way between the levels of [-1, 1]: what is added before rounding decides each of them
    pictures = ((torch.arange(256) / 255 - 0.5) / 0.5).repeat(2, 1)
    scale, zero_point = scale_and_zero_point(pictures.min(), pictures.max(), Grid(8, symmetric=False))
    said = np.clip(
        np.rint(pictures.numpy() / np.float32(scale)) + np.float32(zero_point), 0, 255
    )  # ONNX, QuantizeLinear
    codes = quantize(pictures, scale, zero_point, Grid(8, symmetric=False))
    assert codes.tolist() == said.tolist() and zero_point == 127
    summed_first = (pictures / scale + zero_point).round().clamp(0, 255)
    assert 100 < (summed_first != codes).sum()


def test_per_channel_is_each_channel_by_itself():
    w = torch.randn(3, 5, 2) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    for grid in EVERY_GRID:
        _, scale, _, value = on_grid(w, grid, axis=0)
        assert scale.shape == (3, 1, 1)
        for channel in range(3):
            torch.testing.assert_close(value[channel], on_grid(w[channel], grid)[3], rtol=0, atol=0)


@pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.7, -0.3, 1e-20, -3e7])
def test_constant_weights_are_exact(grid, value):
    w = torch.full((2, 3), value)
    torch.testing.assert_close(on_grid(w, grid)[3], w, rtol=0, atol=0)


@pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
def test_empty_weights_work(grid):
    assert on_grid(torch.empty(0, 3), grid)[3].shape == (0, 3)


weights = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40).map(torch.tensor)


@settings(max_examples=60, deadline=None)
@given(w=weights, grid=st.sampled_from([g for g in EVERY_GRID if g.bits > 1]))
def test_error_is_at_most_half_a_step_and_codes_fit(w, grid):
    codes, scale, zero_point, value = on_grid(w, grid)
    # at most half a step for the symmetric grid; rounding the zero point shifts an asymmetric one by up to another half
    bound = scale * (0.5 if grid.symmetric else 1.0)
    assert ((value - w).abs() <= bound * (1 + 1e-4) + 1e-30).all()
    assert codes.min() >= grid.qmin
    assert codes.max() <= grid.qmax
    torch.testing.assert_close(quantize(value, scale, zero_point, grid), codes, rtol=0, atol=0)  # idempotent


@settings(max_examples=40, deadline=None)
@given(w=weights, grid=st.sampled_from(EVERY_GRID), power=st.integers(-20, 20))
def test_scaling_the_weight_scales_the_result(w, grid, power):
    w = torch.where(w.abs() < 1e-3, torch.zeros_like(w), w)  # keep clear of denormals
    torch.testing.assert_close(on_grid(w * 2.0**power, grid)[3], on_grid(w, grid)[3] * 2.0**power, rtol=0, atol=0)


def test_zero_is_a_level_of_every_grid_from_two_bits():
    for grid in EVERY_GRID:
        if grid.bits > 1:
            assert on_grid(torch.tensor([-0.37, 0.0, 1.93]), grid)[3][1] == 0


def test_fake_quantize_gradient_is_one_inside_and_zero_outside():
    x = torch.tensor([-9.0, -0.6, 0.1, 0.7, 9.0], requires_grad=True)
    grid = Grid(2, symmetric=False)
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(1.0), grid)
    assert y.tolist() == [-1, -1, 0, 1, 2]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [0, 9, 2.5, "4", True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
        Grid(bits)


@settings(max_examples=80, deadline=None)
@given(
    halves=st.lists(st.integers(-600, 600), min_size=4, max_size=4),
    noise=st.floats(-(2.0**-10), 2.0**-10, width=32),
    power=st.integers(-30, 30),
    zero_points=st.lists(st.integers(0, 255), min_size=2, max_size=2),
    grid=st.sampled_from(EVERY_GRID),
)
def test_codes_are_the_definition_to_the_last_tie(halves, noise, power, zero_points, grid):
    scale = np.float32(2.0**power)
    x = np.array(halves, np.float32).reshape(2, 2) / 2 * scale + np.float32(noise) * scale
    zero_point = np.array(zero_points, np.float32).reshape(2, 1)
    expected = np.clip(np.rint(x / scale) + zero_point, grid.qmin, grid.qmax).astype(np.uint8)
    found = quantize(torch.from_numpy(x), torch.full((2, 1), float(scale)), torch.from_numpy(zero_point), grid)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("zero_point", [7.0, 8.0])
def test_what_is_far_out_is_clamped(zero_point):
    far = [-np.inf, -3e38, -2e7, -9e6, -5e6, 5e6, 9e6, 2e7, 3e38, np.inf]
    codes = quantize(torch.tensor(far), torch.tensor(1.0), torch.tensor(zero_point), Grid(4, symmetric=False))
    assert codes.tolist() == [0] * 5 + [15] * 5


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_give_the_codes_of_the_whole(monkeypatch, axis, dtype):
    x, grid = torch.randn(37, 11, 3).to(dtype), Grid(4, symmetric=False)
    scale, zero_point = scale_and_zero_point(*observed_range(x, grid, axis), grid)
    whole = quantize(x, scale, zero_point, grid)
    assert torch.equal(whole, ((x / scale).round() + zero_point).clamp(0, 15).to(torch.uint8))
    monkeypatch.setattr("hf_r2.grid.CHUNK", 100)
    assert torch.equal(quantize(x, scale, zero_point, grid), whole)
