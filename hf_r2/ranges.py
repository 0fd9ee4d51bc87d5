"""Ranges that clip: searched for the least error, or cut at a quantile. Weights and activations share them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_r2.grid import Grid, dequantize, observed_range, scale_and_zero_point

STEPS = 100


def error(x: Tensor, low: Tensor, high: Tensor, grid: Grid, axis: int | None, p: float = 2.0) -> Tensor:
    """Mean of |x - x_hat|**p on the grid over [low, high], in the shape of `low`."""
    scale, zero_point = scale_and_zero_point(low, high, grid)
    return rounding_error(x, scale, zero_point, grid, axis, p)


def rounding_error(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None, p: float) -> Tensor:
    """Mean of |x - x_hat|**p with this scale and zero point, in their shape."""
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (x / divisor + zero_point).round_().clamp_(grid.qmin, grid.qmax)
    off = dequantize(codes, scale, zero_point).sub_(x).abs_()
    off = off.square_() if p == 2 else off.pow_(p)
    return off.mean([d for d in range(x.dim()) if d != axis], keepdim=True)


def mse_range(
    x: Tensor, grid: Grid, axis: int | None, *, p: float = 2.4, search: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The range with the least mean |x - x_hat|**p, per index of `axis` or of all of `x`; shapes as `observed_range`.

    "1d": both ends shrink together, i/100 of them for i = 1..100 (BRECQ; from 21 on there). "2d": 100 widths times all
    zero points (QDrop, PD-Quant), for asymmetric grids. "auto": 2d for asymmetric grids of up to 4 bits over values of
    both signs (8 bits would be 25,600 candidates for next to no gain), else 1d. The plain range is among the candidates:
    with p = 2 the squared error is never above that of minimum and maximum. 1-bit symmetric grids keep their range. NaN
    and infinity count as zero: the range is finite.

    Raises ValueError for p <= 0 and for an unknown search.
    """
    if not p > 0:
        raise ValueError(f"p must be positive, got {p}")
    if search not in ("auto", "1d", "2d"):
        raise ValueError(f"search must be one of auto, 1d, 2d; got {search!r}")
    x = _finite(x)
    low, high = observed_range(x, grid, axis)
    if x.numel() == 0 or (grid.symmetric and grid.bits == 1):
        return low, high
    two = not grid.symmetric and search != "1d" and bool(((low < 0) & (high > 0)).any())
    if search == "auto" and grid.bits > 4:
        two = False
    best = (low, high, error(x, low, high, grid, axis, p))
    for i in range(1, STEPS + 1):
        if two:
            width = (high.clamp(min=0) - low.clamp(max=0)) * (i / STEPS)
            for z in range(2**grid.bits):
                start = -width * (z / grid.qmax)
                best = _better(x, start, start + width, best, grid, axis, p)
        elif i < STEPS:
            best = _better(x, low * (i / STEPS), high * (i / STEPS), best, grid, axis, p)
    return best[0], best[1]


def _better(
    x: Tensor, low: Tensor, high: Tensor, best: tuple[Tensor, Tensor, Tensor], grid: Grid, axis: int | None, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = error(x, low, high, grid, axis, p)
    wins = found < best[2]
    return torch.where(wins, low, best[0]), torch.where(wins, high, best[1]), torch.where(wins, found, best[2])


def percentile_range(x: Tensor, grid: Grid, axis: int | None, *, percentile: float = 0.9999) -> tuple[Tensor, Tensor]:
    """The quantiles (1 - percentile, percentile) per index of `axis` or of all of `x`; of |x| for symmetric grids.

    Taken by rank, at least the first: with fewer than 1 / (1 - percentile) values these are minimum and maximum. So they
    are where both quantiles are zero, for such a range has no width. 1-bit symmetric grids keep their optimal range. NaN
    and infinity count as zero: the range is finite.

    Raises ValueError for a percentile outside (0.5, 1].
    """
    if not 0.5 < percentile <= 1:
        raise ValueError(f"percentile must be above 0.5 and at most 1, got {percentile}")
    x = _finite(x)
    low, high = observed_range(x, grid, axis)
    if x.numel() == 0 or (grid.symmetric and grid.bits == 1):
        return low, high
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    values = (rows.abs() if grid.symmetric else rows).sort(dim=1).values
    cut = int(values.shape[1] * (1 - percentile) + 1e-9)  # values beyond the range on each side
    top = values[:, -1 - cut].view(low.shape)
    bottom = -top if grid.symmetric else values[:, cut].view(low.shape)
    empty = (bottom == 0) & (top == 0)
    return torch.where(empty, low, bottom), torch.where(empty, high, top)


def _finite(x: Tensor) -> Tensor:
    """`x` in float32 with zero, which every range holds or is extended to, in place of NaN and infinity."""
    return x.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
