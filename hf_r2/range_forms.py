"""The three range losses in closed form, each in two sweeps: sums over a weight, then its gradient from those sums.

A weight comes flat, x [n], with a scalar that is a Python float on a CPU, where its sums are floats too; or R weights of
equal size come stacked, x [R, n], with scalars [R, 1]. Sums of parts of a weight add up to those of the whole, and its
bounds are the largest of theirs; so a table of sums can be made in pieces, on many processes, before it is made losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 18  # elements handled at once by each thread, so that they and their temporaries stay in cache
MANY = 1 << 24  # elements handled at once where there is no cache to stay in but launches to save
SAFE_SUM = 1e13  # sums of exponentials up to e^30: far from overflow in float32, and alpha w not yet rounded coarsely
LOWEST_POWER = -86.0  # 2^-86 is nothing beside 1, and products with it are no denormals, which are slow
LOG2_E = math.log2(math.e)

Number = Any  # a float, or a tensor [R, 1]
Numbers = list[Number]
Place = slice | Tensor  # columns, or the indices of single ones
Term = tuple[Place, Tensor, Number]  # where it lies, and two factors
Places = list[tuple[Tensor, Tensor]]


class Form(Protocol):
    """One range loss. `bounds` are max x and -min x of the whole weight; None where they are not needed."""

    bounded: bool  # whether it always takes bounds
    dense: bool  # whether every weight gets a gradient

    def totals(self, x: Tensor, scalar: Number, bounds: Numbers | None, scratch: Scratch) -> Numbers:
        """K sums over the weight."""
        ...

    def safe(self, totals: Tensor) -> Tensor:
        """[N] of bool: whether totals [N, K] that were made without bounds can be relied on."""
        ...

    def shares(self, totals: Tensor, scalars: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of N weights losses [N], their derivatives in the scalars [N], and coefficients of the gradients [N, C].

        From totals [N, K], scalars [N] and bounds [N, 2], 0 where there are none.
        """
        ...

    def gradient(
        self, x: Tensor, scalar: Number, bounds: Numbers | None, shares: Numbers, scratch: Scratch
    ) -> Iterator[Term]:
        """dL/dx, times what the shares were multiplied by, as terms to add up; pieces without a gradient are left out.

        The terms live in `scratch`: each is lost when the next is asked for.
        """
        ...


class Scratch:
    """Working buffers, made once a call: fresh pages cost more than the arithmetic.

    `places`: of a single weight where the few are that have a gradient, and their signs, from its totals for its gradient.
    """

    def __init__(self) -> None:
        self.places: Places | None = None
        self.buffers: dict[tuple, Tensor] = {}
        self.views: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """A pair [2, *part.shape] and another one [*part.shape] of any content, in the dtype of `part`."""
        key = (part.shape, part.dtype, part.device)
        if key not in self.views:
            kind, size = key[1:], part.numel()
            held = self.buffers.get(kind)
            if held is None or held.numel() < 3 * size:
                held = self.buffers[kind] = torch.empty(3 * size, dtype=part.dtype, device=part.device)
                self.views = {other: view for other, view in self.views.items() if other[1:] != kind}
            self.views[key] = (held[: 2 * size].view(2, *part.shape), held[2 * size : 3 * size].view(part.shape))
        return self.views[key]


def readable(device: torch.device) -> bool:
    """Whether values there can be read without waiting for the device."""
    return device.type == "cpu"


def is_dense(t: Tensor) -> bool:
    """Whether its elements fill a piece of memory without gaps, in whatever order: contiguous, channels last, transposed."""
    if t.is_contiguous():
        return True
    filled = 1
    for size, stride in sorted(zip(t.shape, t.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def flat(t: Tensor) -> Tensor:
    """Its elements [n] in the order of memory, a view; a copy in the order of its axes where it is not dense."""
    if t.is_contiguous() or not is_dense(t):
        return t.reshape(-1)
    return t.as_strided((t.numel(),), (1,))


def single(x: Tensor) -> bool:
    """One weight on a CPU: its sums are Python floats, cheaper to calculate with than tensors of one element."""
    return x.dim() == 1 and readable(x.device)


def working_dtype(w: Tensor) -> torch.dtype:
    """What `w` is summed in."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def pieces(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`x` in its working dtype, in pieces of some columns that stay in cache, and where each lies."""
    rows = 1 if x.dim() == 1 else x.shape[0]
    width = max(1, (CHUNK * torch.get_num_threads() if x.device.type == "cpu" else MANY) // rows)
    dtype = working_dtype(x)
    for start in range(0, x.shape[-1], width):
        place = slice(start, start + width)
        part = x if width >= x.shape[-1] else x[..., place]
        yield place, part if part.dtype == dtype else part.to(dtype)


def bounds_of(x: Tensor) -> Numbers:
    """max x and -min x; -inf for an empty weight."""
    if single(x):
        low, high = math.inf, -math.inf
        for _, part in pieces(x):
            least, most = (side.item() for side in torch.aminmax(part))
            low, high = (math.nan, math.nan) if least != least else (min(low, least), max(high, most))
            if low != low:  # NaN stays: later comparisons would pass over it
                break
        return [high, -low]
    found = [(part.amax(-1, keepdim=True), -part.amin(-1, keepdim=True)) for _, part in pieces(x)]
    if not found:
        empty = torch.full((*x.shape[:-1], 1), -math.inf, dtype=working_dtype(x), device=x.device)
        return [empty, empty]
    return [torch.cat(side, dim=-1).amax(-1, keepdim=True) for side in zip(*found, strict=True)]


def _total(x: Tensor) -> Number:
    return x.sum().item() if single(x) else x.sum(-1, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Number:
    return torch.dot(a, b).item() if single(a) else (a * b).sum(-1, keepdim=True)


def _larger(a: Number, b: Number) -> Number:
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


class Magnitude:
    """max |x| (ALGORITHMS 1.2); the largest weights share the gradient."""

    bounded, dense = True, False

    def totals(self, x: Tensor, scalar: Number, bounds: Numbers | None, scratch: Scratch) -> Numbers:
        """How many weights are the largest."""
        ties: Number = 0.0
        for _, sign in self._signs(x, bounds, scratch):
            ties = ties + (float(len(sign)) if single(x) else _dot(sign, sign))
        return [ties]

    def safe(self, totals: Tensor) -> Tensor:
        return torch.ones(len(totals), dtype=torch.bool)

    def shares(self, totals: Tensor, scalars: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest = bounds.amax(-1)
        largest = torch.where(largest == -math.inf, 0.0, largest)  # of no weight at all
        return largest, torch.zeros_like(largest), (largest > 0)[:, None] / totals.clamp(min=1)

    def gradient(
        self, x: Tensor, scalar: Number, bounds: Numbers | None, shares: Numbers, scratch: Scratch
    ) -> Iterator[Term]:
        for place, sign in self._signs(x, bounds, scratch):
            yield place, sign, shares[0]

    def _signs(self, x: Tensor, bounds: Numbers | None, scratch: Scratch) -> Iterator[tuple[Place, Tensor]]:
        """Sign of the largest weights, 0 of others; of a single weight the places and signs of the largest alone."""
        assert bounds is not None
        largest = _larger(*bounds)
        if single(x):
            if scratch.places is None:  # not of zeros alone, and neither of NaN
                values = [s * largest for s, bound in zip((1, -1), bounds, strict=True) if bound == largest > 0]
                scratch.places = [*_places(x, values)]
            yield from scratch.places
            return
        for place, part in pieces(x):
            sign = scratch(part)[1]
            torch.eq(torch.abs(part, out=sign), largest, out=sign)
            yield place, sign.copysign_(part)


def _places(x: Tensor, values: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Where `x` has one of these values, and their signs."""
    for value in values:
        for columns, part in pieces(x):
            found = np.flatnonzero(part.numpy() == value)  # several times as quick as torch.nonzero
            if len(found):
                yield (
                    torch.from_numpy(found + columns.start),
                    torch.full((len(found),), math.copysign(1, value), dtype=part.dtype),
                )


class Excess:
    """size + sum of (|x| - size)+ (ALGORITHMS 1.3)."""

    bounded, dense = False, False

    def totals(self, x: Tensor, scalar: Number, bounds: Numbers | None, scratch: Scratch) -> Numbers:
        """The sum of what sticks out, and how many weights do."""
        excess: Number = 0.0
        outside: Number = 0.0
        for _, over, sign in self._outside(x, scalar, scratch):
            excess, outside = excess + _dot(over, sign), outside + _dot(sign, sign)
        return [excess, outside]

    def safe(self, totals: Tensor) -> Tensor:
        return torch.ones(len(totals), dtype=torch.bool)

    def shares(self, totals: Tensor, scalars: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return scalars + totals[:, 0], 1 - totals[:, 1], torch.ones_like(totals[:, :1])

    def gradient(
        self, x: Tensor, scalar: Number, bounds: Numbers | None, shares: Numbers, scratch: Scratch
    ) -> Iterator[Term]:
        for place, _, sign in self._outside(x, scalar, scratch):
            yield place, sign, shares[0]

    def _outside(self, x: Tensor, size: Number, scratch: Scratch) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """How far each weight sticks out, with its sign, and that sign, 0 inside."""
        for place, part in pieces(x):
            over, sign = scratch(part)[0]
            torch.sub(part, torch.clamp(part, -size, size, out=over), out=over)
            yield place, over, torch.sign(over, out=sign)


class SoftRange:
    """s_max - s_min (ALGORITHMS 1.4, eq. 1 of S1 without its last term).

    With bounds the exponentials of either side are divided by their largest one, and moments are those of the distance
    from the bound. Without, where alpha |x| is small, one exponential serves both: exp(-alpha x) = 1 / exp(alpha x).
    """

    bounded, dense = False, True

    def totals(self, x: Tensor, scalar: Number, bounds: Numbers | None, scratch: Scratch) -> Numbers:
        """For the upper and the lower side: sums of the exponentials, of y times them and of y^2 times them.

        y is the distance to the bound of that side, x and -x without bounds.
        """
        sums: Numbers = [0.0] * 6
        for _, part in pieces(x):
            both, other = scratch(part)
            if bounds is None:
                _exponentials(part, scalar, both)
                more = _moments(both, part, other)
            else:
                more = []
                for side, bound in enumerate(bounds):
                    power = _power(_distance(part, side, bound, out=other), scalar, out=both[0])
                    more += [_total(power), _dot(other, power), _dot(other.mul_(other), power)]
            sums = [total + value for total, value in zip(sums, more, strict=True)]
        return sums

    def safe(self, totals: Tensor) -> Tensor:
        return (totals[:, ::3] < SAFE_SUM).all(-1)  # False too where a sum is NaN

    def shares(self, totals: Tensor, scalars: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of a side is power x (slope y + offset), by which p (1 + alpha (x - s_max)) is meant."""
        losses, variances, coefficients = [], [], []
        for side in (0, 1):
            z, first, second = totals[:, 3 * side : 3 * side + 3].unbind(-1)
            empty = z == 0
            z = z.masked_fill(empty, 1)
            mean = first / z
            losses.append(torch.where(empty, 0.0, mean + bounds[:, side]))
            variances.append(second / z - mean * mean)
            coefficients += [scalars / z, (1 - scalars * mean) / z]
        return sum(losses), sum(variances), torch.stack(coefficients, dim=-1)  # type: ignore[return-value]

    def gradient(
        self, x: Tensor, scalar: Number, bounds: Numbers | None, shares: Numbers, scratch: Scratch
    ) -> Iterator[Term]:
        if bounds is None:
            lines = [_line(x, shares[0], shares[1]), _line(x, shares[2], -shares[3])]
            for place, part in pieces(x):
                both, other = scratch(part)
                _exponentials(part, scalar, both)
                for side in (0, 1):
                    yield place, _linear(part, *lines[side], other), both[side]
            return
        lines = [_line(x, shares[0], shares[1]), _line(x, -shares[2], -shares[3])]
        for place, part in pieces(x):
            both, other = scratch(part)
            for side, bound in enumerate(bounds):
                y = _distance(part, side, bound, out=both[1])
                yield place, _linear(y, *lines[side], other), _power(y, scalar, out=both[0])


def _exponentials(x: Tensor, alpha: Number, both: Tensor) -> None:
    """exp(alpha x) and exp(-alpha x), one the inverse of the other; powers of 2, which are quicker than those of e."""
    up, down = both[0], both[1]
    torch.mul(x, alpha * LOG2_E, out=up).exp2_()
    torch.reciprocal(up, out=down)


def _moments(both: Tensor, x: Tensor, square: Tensor) -> Numbers:
    """The totals of `SoftRange` without bounds; `square` is overwritten."""
    torch.mul(x, x, out=square)
    # torch.mv takes both sides at once, a tenth quicker, but is ten times less exact
    moments = [(_total(side), _dot(side, x), _dot(side, square)) for side in both]
    (sum_up, first_up, second_up), (sum_down, first_down, second_down) = moments
    return [sum_up, first_up, second_up, sum_down, -first_down, second_down]


def _distance(x: Tensor, side: int, bound: Number, out: Tensor) -> Tensor:
    """x - max x, or min x - x: nothing above 0."""
    return torch.sub(x, bound, out=out) if side == 0 else torch.sub(torch.neg(x, out=out), bound, out=out)


def _power(y: Tensor, alpha: Number, out: Tensor) -> Tensor:
    """exp(alpha y)."""
    return torch.mul(y, alpha * LOG2_E, out=out).clamp_(min=LOWEST_POWER).exp2_()


def _line(x: Tensor, slope: Number, offset: Number) -> tuple[Number, Tensor]:
    """What `_linear` takes."""
    return slope, torch.as_tensor(offset, dtype=working_dtype(x), device=x.device)


def _linear(x: Tensor, slope: Number, offset: Tensor, out: Tensor) -> Tensor:
    """offset + slope x, in one sweep where the slope is a float."""
    if isinstance(slope, Tensor):
        return torch.mul(x, slope, out=out).add_(offset)
    return torch.add(offset, x, alpha=slope, out=out)


MAGNITUDE, EXCESS, SOFT_RANGE = Magnitude(), Excess(), SoftRange()
