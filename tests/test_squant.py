"""SQuant against slow loops, its guarantees on sums of errors, and the road through `quantize`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.grid import Grid
from hf_r2.grid import quantize as nearest
from hf_r2.packed_layers import encoded, packed_layers
from hf_r2.ptq.squant import by_kernel, flip, from_kernel
from tests.models import float_model
from tests.reference import squant as slow


def test_golden_row():
    x = torch.tensor([0.4, 0.4, 0.4, 0.2, 1.3])
    assert flip(x.view(1, 1, 5), 0, 15).flatten().tolist() == [1, 1, 0, 0, 1]
    assert flip(x.view(1, 5, 1), 0, 15).flatten().tolist() == [1, 1, 0, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(3, 4, 9), (2, 7, 4), (4, 30, 1), (1, 1, 9), (3, 100, 1), (2, 80, 4)]),
    st.integers(1, 8),
    st.booleans(),
)
def test_equals_the_slow_loop(seed, shape, bits, coarse):
    grid = Grid(bits, symmetric=bool(seed % 2))
    # Beyond the grid's ends too: what is clipped cannot go further.
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (2**bits + 1) - 1
    if coarse:  # many equal errors, sums exactly between two counts: of equal ones the first go, in rows of any length
        x = (x * 8).round() / 8
    assert flip(x, grid.qmin, grid.qmax).tolist() == slow.flip(x.tolist(), grid.qmin, grid.qmax)


def test_guarantees_where_there_is_room():
    x = torch.rand(16, 32, 9, generator=torch.Generator().manual_seed(0)) * 12 + 2
    before, error = x.round() - x, flip(x, 0, 15).float() - x
    assert before.sum((1, 2)).abs().max() > 3 and before.sum(2).abs().max() > 1.5  # rounding alone keeps neither
    assert error.abs().max() < 1
    assert error.sum(2).abs().max() <= 1 + 1e-5
    assert error.sum((1, 2)).abs().max() <= 0.5 + 1e-4
    row = flip(x.view(16, 288, 1), 0, 15).float() - x.view(16, 288, 1)
    assert row.sum((1, 2)).abs().max() <= 0.5 + 1e-4 and row.abs().max() < 1


def test_kernel_sums_after_the_first_stage_alone():
    x = torch.rand(1, 1, 9, generator=torch.Generator().manual_seed(1)) + torch.arange(9) / 3 + 2
    assert (flip(x, 0, 15).float() - x).sum().abs() <= 0.5 + 1e-5


def test_a_sum_of_zero_moves_nothing():
    x = torch.tensor([[[2.25, 3.75, 4.0]], [[5.0, 6.0, 7.0]]])
    assert flip(x, 0, 15).tolist() == x.round().int().tolist()


def test_nothing_to_flip_to_at_the_border():
    x = torch.full((1, 2, 9), 15.4)
    assert flip(x, 0, 15).eq(15).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_by_output_channel(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    kernels = by_kernel(layer, layer.weight)
    assert kernels.shape == (6, 4 // groups, 9)
    for channel in range(6):  # all that an output channel is made of
        x = torch.ones(1, 4, 1, 1)
        torch.testing.assert_close(kernels[channel].sum(), layer(x)[0, channel].sum() - 9 * layer.bias[channel])
    assert torch.equal(from_kernel(layer, kernels, layer.weight.shape), layer.weight)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v1", "gpt2", "transposed"])
def test_channel_sums_of_packed_models(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)) if name == "transposed" else float_model(name)
    packed = quantize(model, R2QuantConfig(method="squant", weight_bits=4, options={"fold": False}))
    flipped = 0
    for key, module in packed_layers(packed).items():
        e, layer = encoded(module), model.get_submodule(key)
        weight = layer.weight.detach()
        position = weight / e.scale + e.zero_point
        off = by_kernel(layer, e.codes.float() - position)
        assert off.sum((1, 2)).abs().max() <= 0.5 + 1e-4
        flipped += int((e.codes != nearest(weight, e.scale, e.zero_point, Grid(4))).sum())
    assert flipped > 0


def test_one_bit_and_zero_weights_keep_the_nearest():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.zero_()
    for bits in (1, 4):
        one = quantize(model, R2QuantConfig(method="squant", weight_bits=bits))
        assert one[1].weight.eq(0).all()
    other = quantize(model, R2QuantConfig(weight_bits=1))
    one = quantize(model, R2QuantConfig(method="squant", weight_bits=1))
    assert torch.equal(one[0].weight, other[0].weight)


def test_bias_correction_from_statistics():
    model = float_model("mobilenet_v1")
    states = []
    for correction in ("none", "analytic"):
        config = R2QuantConfig("squant", 3, symmetric=False, options={"bias_correction": correction})
        states.append(quantize(model, config).state_dict())
    biases = [key for key in states[0] if key.endswith("bias") and "conv_stem" not in key]
    changed = [key for key in biases if not torch.equal(states[0][key], states[1][key])]
    assert len(changed) == len(biases) == 27
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if key not in changed)
    with pytest.raises(ValueError, match="bias_correction must be none or analytic, got 'some'"):
        quantize(model, R2QuantConfig("squant", options={"bias_correction": "some"}))
