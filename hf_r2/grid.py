"""Uniform grids: the only file with scale and zero-point arithmetic.

A code is an integer from 0 to 2**bits - 1 and stands for `(code - zero_point) * scale`. Symmetric grids have the fixed
zero point 2**(bits - 1) and leave code 0 unused, so that they reach equally far to both sides; at 1 bit the zero point
lies between the two codes (0.5), and the levels are plus and minus half a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 1, 8
CHUNK = 1 << 19  # weights quantized at once, in cache
ROUNDER = 1.5 * 2**23  # the integers around it are all the float32 there are


def check_bits(bits: object, what: str = "bits") -> None:
    """Raises ValueError unless `bits` is an integer from 1 to 8."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{what} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")


@dataclass(frozen=True)
class Grid:
    """`2**bits` equally spaced levels; `symmetric` ones around zero, others wherever the range lies (zero included)."""

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def qmin(self) -> int:
        """Lowest code in use: symmetric grids of 2 bits and more leave code 0 out."""
        return 1 if self.symmetric and self.bits > 1 else 0

    @property
    def qmax(self) -> int:
        """Highest code."""
        return 2**self.bits - 1

    @property
    def symmetric_zero_point(self) -> float:
        """The zero point of every symmetric grid of this width: in the middle of the codes in use."""
        return 2.0 ** (self.bits - 1) if self.bits > 1 else 0.5


def observed_range(w: Tensor, grid: Grid, axis: int | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of `w`, per index of `axis` (shape [1, .., C, .., 1]) or of all of it (shape [1, .., 1]).

    For the 1-bit symmetric grid the range is plus and minus the mean magnitude: the two levels of least squared error
    (XNOR-Net, arXiv:1603.05279, eq. 6); its minimum and maximum would put every weight on the outliers.
    """
    dims = [d for d in range(w.dim()) if d != axis]
    if w.numel() == 0:
        shape = [w.shape[d] if d == axis else 1 for d in range(w.dim())]
        return w.new_zeros(shape), w.new_zeros(shape)
    low, high = w.amin(dims, keepdim=True), w.amax(dims, keepdim=True)
    if grid.bits == 1 and grid.symmetric:
        mean = w.abs().mean(dims, keepdim=True)
        constant = low == high  # their mean magnitude is known without rounding
        return torch.where(constant, low, -mean), torch.where(constant, high, mean)
    return low, high


def scale_and_zero_point(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale (> 0; 0 for all-zero weights at 1 bit symmetric) and zero point (a code) of the grid that covers [low, high].

    From 2 bits on it holds zero exactly.

    Symmetric: scale = max(|low|, |high|) / (2**(bits-1) - 1). Asymmetric: the range is extended to hold 0, then
    scale = (high - low) / (2**bits - 1), zero_point = round(-low / scale) (ALGORITHMS section 0.2, as in QDrop).
    Where low = high the scale is that value itself, so that constant weights are exact.
    """
    magnitude = torch.maximum(low.abs(), high.abs())
    if grid.symmetric:
        steps = max(2 ** (grid.bits - 1) - 1, 0.5)
        scale = torch.where(low == high, magnitude / min(steps, 1.0), magnitude / steps)
        if grid.bits > 1:  # at 1 bit no code stands for zero: an all-zero weight keeps scale 0
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.full_like(scale, grid.symmetric_zero_point)
    constant = low == high
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(constant, magnitude, (high - low) / grid.qmax)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, grid.qmax)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes of `x`, uint8, in its shape: clamp(round(x / scale) + zero_point), ties to even, as other runtimes compute it.

    Where the zero point is no integer (1 bit symmetric, learned offsets) its fraction is rounded along with x / scale.
    (Pictures scaled to [-1, 1] are ties throughout: adding the zero point first would let its rounding decide each of them.)
    """
    divisor, x = torch.where(scale > 0, scale, torch.ones_like(scale)).detach(), x.detach()
    zero_point = zero_point.detach().to(divisor.dtype)
    whole = zero_point.floor()
    fraction = zero_point - whole
    # what the fractions are is only asked where nothing has to wait for the answer: eager, on the CPU
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    eager = x.device.type == "cpu" and not traced
    if eager and x.dtype == divisor.dtype == torch.float32 and x.dim() > 0 and not fraction.any():
        return _codes_by_addition(x, divisor, whole, grid)
    numbers = (x / divisor).add_(fraction).round_().add_(whole).clamp_(grid.qmin, grid.qmax)
    return numbers.to(torch.int32).to(torch.uint8)  # floats turn into bytes fastest by way of int32


def _codes_by_addition(x: Tensor, divisor: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The codes of float32 `x` for zero points that are integers, in fewer passes, slice by slice in cache.

    Added to 1.5 * 2**23 a float32 is rounded to an integer, ties to even, and the lowest byte of the sum is the code. The
    number added must be even to keep ties where they are: what makes an odd zero point even is taken off again.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    odd = zero_point.remainder(2)
    base, uneven = zero_point + odd + ROUNDER, bool(odd.any())
    step = max(1, CHUNK * len(x) // max(1, x.numel()))
    levels = torch.empty(x[:step].shape, device=x.device)
    numbers = levels.view(torch.int32)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        by, plus, less = (t[rows] if t.dim() == x.dim() and len(t) > 1 else t for t in (divisor, base, odd))
        part = x[rows]
        level = torch.div(part, by, out=levels[: len(part)]).add_(plus)
        level = level.sub_(less) if uneven else level
        level.clamp_(ROUNDER + grid.qmin, ROUNDER + grid.qmax)
        codes[rows] = numbers[: len(part)]
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The values that the codes stand for, in the dtype of `scale`."""
    return codes.to(scale.dtype).sub_(zero_point.to(scale.dtype)).mul_(scale)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """`x` moved to its nearest level; the gradient is that of the clamp: 1 inside the range, 0 outside."""
    with torch.no_grad():
        level = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
        return level
    low = (grid.qmin - zero_point) * scale
    high = (grid.qmax - zero_point) * scale
    clamped = torch.minimum(torch.maximum(x, low), high)
    return clamped + (level - clamped).detach()
