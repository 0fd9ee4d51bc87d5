"""Range estimation by golden section, and the same search in a transformed weight space (REQuant, arXiv:2510.04044)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.attach import encoder_of, prepared_layers, replace_encoder_
from hf_r2.encoders.affine import Affine
from hf_r2.encoders.kmeans import nearest_scalar
from hf_r2.encoders.palette import Palette

COARSE = 20  # points of the coarse grid: J has several local minima on real weights
FINE, NEAR = 10, 2.5e-3  # a last look at so many points within so much on both sides
GOLDEN = (5**0.5 - 1) / 2
POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
TRANSFORMS = ("power", "none")


def requant_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    transform: str = "power",
    tol: float = 1e-4,
) -> None:
    """Gives every weight of a prepared model the symmetric range alpha max|w| of least squared error, data-free.

    With `transform` "power" the search is repeated on T(w) = sign(w) (|w| / max|w|)^g for g in 0.4, 0.5, .. 1: uniform levels
    there are levels that crowd around zero here. The g of the least error, taken in the weight's own space over the whole
    weight, wins; g = 1 is the plain method. Because T is homogeneous, a weight needs one palette and one scale a
    channel. (The paper's own transformation is not public; this one is ours.) 1-bit grids keep their optimal range.

    Raises ValueError for asymmetric grids: symmetric quantization is what the method is about.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}; got {transform!r}")
    done: set[int] = set()
    for layer in prepared_layers(model):
        encoder = encoder_of(layer)
        if id(encoder) in done or not isinstance(encoder, Affine):
            continue
        done.add(id(encoder))
        if not encoder.grid.symmetric:
            raise ValueError("requant searches symmetric ranges: use symmetric=True, or method='mse'")
        if encoder.grid.bits == 1 or layer.weight.numel() == 0:
            continue
        weight = layer.weight.detach().float()
        g, scale = search(weight, encoder.grid.bits, encoder.axis, POWERS if transform == "power" else (1.0,), tol)
        if g == 1.0:
            encoder.set_range_(-scale, scale)
        else:
            replacement = Palette(palette(encoder.grid.bits, g).to(weight.device), scale)
            replace_encoder_(model, layer, replacement)
            done.add(id(replacement))


def transformed(w: Tensor, magnitude: Tensor, g: float) -> Tensor:
    """T(w) = sign(w) (|w| / magnitude)^g: odd, monotone."""
    return w.sign() * (w.abs() / magnitude).pow(g)


def restored(t: Tensor, magnitude: Tensor, g: float) -> Tensor:
    """The inverse of `transformed`."""
    return t.sign() * t.abs().pow(1 / g) * magnitude


def palette(bits: int, g: float) -> Tensor:
    """Levels [2**bits] in [-1, 1], ascending: uniform ones of T's space, brought back; the lowest stands twice."""
    steps = 2 ** (bits - 1) - 1
    levels = restored(torch.arange(-steps, steps + 1) / steps, torch.ones(()), g)
    return torch.cat([levels[:1], levels])


def search(x: Tensor, bits: int, axis: int | None, powers: Iterable[float], tol: float) -> tuple[float, Tensor]:
    """The power g with the least error over the whole weight, and its scale per index of `axis` or of all of `x`."""
    found = []
    for g in powers:
        scale, errors = best_scale(x, palette(bits, g).to(x.device), axis, tol)
        found.append((float(errors.sum()), -g, scale))
    _, g, scale = min(found, key=lambda one: one[:2])
    return -g, scale


def best_scale(x: Tensor, levels: Tensor, axis: int | None, tol: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The scale in (0, max|x|] with the least mean (x - scale levels[nearest])^2, and that error; in the shape of a range.

    A coarse grid, then golden section in the bracket of its best point, per channel, until it is narrower than `tol`
    of max|x|, then a fine grid around it; the best point seen wins, so the error never exceeds that of max|x|.
    """
    dims = [d for d in range(x.dim()) if d != axis]
    top = x.abs().amax(dims, keepdim=True)
    top = torch.where(top > 0, top, torch.ones_like(top))

    def error(alpha: Tensor) -> Tensor:
        scale = alpha * top
        return (levels[nearest_scalar(x / scale, levels).int()] * scale - x).square().mean(dims, keepdim=True)

    best = torch.ones_like(top)
    least = error(best)
    for i in range(1, COARSE):
        best, least = _least(best, least, torch.full_like(top, i / COARSE), error)
    low, high = (best - 1 / COARSE).clamp(min=1e-6), (best + 1 / COARSE).clamp(max=1)
    while float((high - low).max()) > tol:
        one, two = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        first, second = error(one), error(two)
        low, high = torch.where(first < second, low, one), torch.where(first < second, two, high)
    best, least = _least(best, least, (low + high) / 2, error)
    near = best
    for i in range(-FINE, FINE + 1):  # every rounding boundary is a kink: the next minimum may lie a little beside
        best, least = _least(best, least, (near + i * NEAR / FINE).clamp(1e-6, 1), error)
    return best * top, least


def _least(best: Tensor, least: Tensor, other: Tensor, error: Any) -> tuple[Tensor, Tensor]:
    found = error(other)
    return torch.where(found < least, other, best), torch.where(found < least, found, least)
