"""Range estimation: the table of optimal clips, the guarantee, the transformed space, and the road through `quantize`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2 import R2QuantConfig, quantize
from hf_r2.encoders.palette import Palette
from hf_r2.packed_layers import packed_layers
from hf_r2.ptq.requant import POWERS, best_scale, palette, restored, search, transformed
from hf_r2.report import report
from tests.models import auto_class, float_model, logits


def gaussian():
    """The quantiles of the normal distribution: deterministic, maximum 3.668329285121323."""
    return torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)


@pytest.mark.parametrize(
    ("bits", "alpha", "mse"),
    [
        (2, 0.3337, 0.1899510), (3, 0.5320, 0.04669487), (4, 0.6733, 0.01276576), (6, 0.8851, 0.001007178),
        (8, 0.9900, 6.851025e-5),
    ],
)  # fmt: skip
def test_optimal_clips_of_a_gaussian(bits, alpha, mse):
    scale, error = best_scale(gaussian(), palette(bits, 1.0).double(), None)
    assert abs(scale.item() / 3.668329285121323 - alpha) < 5e-4
    assert error.item() == pytest.approx(mse, rel=2e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([None, 0]), st.sampled_from(POWERS))
def test_never_worse_than_the_whole_range_and_equivariant(seed, bits, axis, g):
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)).pow(3).double()
    levels = palette(bits, g).double()
    scale, error = best_scale(x, levels, axis)
    top = x.abs().amax(None if axis is None else 1, keepdim=axis is not None)
    whole = (levels[(x / top)[..., None].sub(levels).abs().argmin(-1)] * top - x).square()
    whole = whole.mean() if axis is None else whole.mean(1, keepdim=True)
    assert (error <= whole * (1 + 1e-9)).all() and (scale <= top * (1 + 1e-12)).all()
    torch.testing.assert_close(best_scale(x * 7, levels, axis)[0], scale * 7)


@pytest.mark.parametrize("g", POWERS)
def test_the_transformation_has_its_inverse(g):
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    torch.testing.assert_close(restored(transformed(x, torch.tensor(3.0), g), torch.tensor(3.0), g), x)
    assert (transformed(x, torch.tensor(3.0), g).diff() > 0).all()


def test_heavy_tails_choose_a_power_and_uniform_weights_none():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    heavy, uniform = x.sign() * x.abs().pow(3), torch.linspace(-1, 1, 4097)
    g, _ = search(heavy, 4, None, POWERS, 1e-4)
    assert g < 0.7
    assert search(uniform, 4, None, POWERS, 1e-4)[0] == 1.0
    plain, power = (best_scale(heavy, palette(4, p), None)[1] for p in (1.0, g))
    assert power < 0.5 * plain


def test_palette_takes_the_nearest_level_and_the_identity_s_gradient():
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    levels, scale = torch.tensor([-1.0, -0.2, 0.1, 0.9]), torch.tensor([[0.5], [1.0], [3.0]])
    encoder = Palette(levels, scale)
    nearest = (w.detach()[..., None] - scale[..., None] * levels).abs().argmin(-1)
    e = encoder.encode(w)
    assert encoder.bits == e.bits == 2 and torch.equal(e.codes, nearest.to(torch.uint8))
    value = encoder(w)
    torch.testing.assert_close(value, levels[nearest] * scale, rtol=0, atol=0)
    value.mul(torch.arange(40)).sum().backward()
    assert torch.equal(w.grad, torch.arange(40.0).expand(3, 40))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", ["bert", "resnet", "marian"])
def test_packs_and_comes_back(name, granularity, tmp_path):
    model = float_model(name)
    packed = {
        method: quantize(model, R2QuantConfig(method=method, weight_bits=3, granularity=granularity, options={"fold": False}))
        for method in ("nearest", "requant")
    }  # fmt: skip
    kinds = {row["kind"] for row in report(packed["requant"])["layers"]}
    assert "palette" in kinds
    for key, module in packed_layers(packed["requant"]).items():
        true = model.get_submodule(key).weight
        before = (packed_layers(packed["nearest"])[key].weight - true).square().mean()
        assert (module.weight - true).square().mean() <= before * (1 + 1e-6)
    packed["requant"].save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(packed["requant"], name))


def test_without_a_transformation_it_stays_affine():
    packed = quantize(
        float_model("bert"), R2QuantConfig(method="requant", weight_bits=3, options={"transform": "none"})
    )
    assert {row["kind"] for row in report(packed)["layers"]} == {"affine"}


def test_asymmetric_grids_are_refused():
    with pytest.raises(ValueError, match="requant searches symmetric ranges"):
        quantize(float_model("bert"), R2QuantConfig(method="requant", symmetric=False))
