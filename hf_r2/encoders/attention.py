"""The attention of points over centroids, softmax_j(-|p_i - c_j|² / tau), chunk by chunk in buffers that stay in cache.

It is laid out by centroids, [k, n], and left unnormalised: the sums over it that are needed cost less than a pass over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements of attention computed at once: with the buffers beside it, they stay in cache
LOWEST = -100.0  # log2 of the attention is raised to it: denormal numbers are slow and mean nothing
DRIFT = 8.0  # how far log2 of the largest attention may be from zero before its shift is computed anew


def attention(points: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Columns softmax_j(-|p_i - c_j|² / tau), [k, n], of points in columns [d, n]; the term |p_i|² cancels."""
    slope, level = _line(centroids, tau)
    logits = torch.addmm(level[:, None], slope, points)
    drawn = logits.sub_(logits.amax(0)).clamp_(min=LOWEST).exp2_()
    return drawn.div_(drawn.sum(0))


def _line(centroids: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Slope [k, d] and level [k] of log2 of the attention as a function of the point, but for what cancels."""
    unit = math.log2(math.e) / tau
    return centroids * (2 * unit), centroids.square().sum(1) * -unit


@dataclass
class Part:
    """A chunk of n points.

    `raw` [k, n]: attention times any factor by columns; `norm` [n]: one over its column sums; `points` [d + 1, n]: the points,
    and ones; `others`: what was asked for beside them, [d, n] each; `spare` [k, n]: a buffer; `weight` [n]: `norm` times how
    many points each stands for. All are overwritten by the next part.
    """

    raw: Tensor
    norm: Tensor
    weight: Tensor
    points: Tensor
    others: tuple[Tensor, ...]
    spare: Tensor

    def centred(self, left: Tensor, right: Tensor) -> Tensor:
        """raw_ji (v_ji - sum_l a_li v_li) for v = left [k, r] @ right [r, n]: what the softmax's gradient does to it."""
        v = torch.mm(left, right, out=self.spare)
        mean = (left.T @ self.raw).mul_(right).sum(0).mul_(self.norm)
        return v.sub_(mean).mul_(self.raw)


class Attention:
    """Attention of `points` [b, d, n] (b times n of them), of which `mass` [n] says how many each stands for (b = 1).

    `shift` [b, n]: about the largest log2 of a point's attention, from an earlier use, at the centroids `reference`.
    """

    def __init__(self, points: Tensor, mass: Tensor | None = None):
        self.points, self.mass = points, mass
        self.shift = points.new_empty(0)
        self.reference: Tensor | None = None
        self.length = 0.0  # of the longest point, at most

    def parts(self, centroids: Tensor, tau: float, *others: Tensor) -> Iterator[tuple[Part, tuple[slice, ...]]]:
        """The chunks, and where they lie in `points` and in `others`, tensors of the same shape."""
        slope, level = _line(centroids, tau)
        k, d = centroids.shape
        known = self._known(centroids, tau)
        line = torch.cat([slope, level[:, None], torch.ones_like(level[:, None])], 1)
        width = max(1, CHUNK // k)
        rows = self.points.new_empty(2 * k + d * len(others), _widest(self.points.shape, width))
        frame = self.points.new_ones(d + 2, rows.shape[1])
        for where in _pieces(self.points.shape, width):
            loaded = self.points[where]
            n = loaded.shape[0] * loaded.shape[2]
            raw, spare, p = rows[:k, :n], rows[k : 2 * k, :n], frame[:, :n]
            _fill(p[:d], loaded)
            p[d].fill_(1)
            shift = self.shift[where[0], where[2]]
            if known:
                torch.neg(shift, out=p[d + 1].view(shift.shape))
                torch.mm(line, p, out=raw)
            else:
                torch.mm(line[:, :-1], p[:-1], out=raw)
                largest = raw.amax(0)
                raw.sub_(largest)
                shift.copy_(largest.view(shift.shape))
            raw.clamp_(min=LOWEST).exp2_()
            beside = tuple(rows[2 * k + i * d :][:d, :n] for i in range(len(others)))
            for buffer, other in zip(beside, others, strict=True):
                _fill(buffer, other[where])
            norm = raw.sum(0).reciprocal_()
            yield (
                Part(raw, norm, norm if self.mass is None else norm * self.mass[where[2]], p[:-1], beside, spare),
                where,
            )

    def _known(self, centroids: Tensor, tau: float) -> bool:
        """Whether `shift` is close to what it would be at these centroids; else it is to be computed at them."""
        if self.reference is None:
            self.shift = self.points.new_empty(self.points.shape[0], self.points.shape[2])
            low, high = self.points.aminmax()
            self.length = max(-float(low), float(high)) * math.sqrt(self.points.shape[1])
        else:
            (slope, level), (slope_, level_) = _line(centroids, tau), _line(self.reference, tau)
            drift = (slope - slope_).norm(dim=1) * self.length + (level - level_).abs()
            if bool(drift.max() <= DRIFT):
                return True
        self.reference = centroids.clone()  # the encoder moves its own in place
        return False


def _fill(buffer: Tensor, values: Tensor) -> None:
    """Copies values [b, d, n] into the columns of the buffer [d, b n]."""
    buffer.unflatten(1, (values.shape[0], -1)).copy_(values.transpose(0, 1))


def put(buffer: Tensor, into: Tensor) -> None:
    """Copies the columns of the buffer [d, b n] into [b, d, n]."""
    into.transpose(0, 1).copy_(buffer.unflatten(1, (into.shape[0], -1)))


def _pieces(shape: torch.Size, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """Where chunks of about `width` points lie in [b, d, n]."""
    b, _, n = shape
    rows, columns = max(1, width // n), -(-n // -(-n // width))
    for i in range(0, b, rows):
        for j in range(0, n, columns):
            yield slice(i, i + rows), slice(None), slice(j, j + columns)


def _widest(shape: torch.Size, width: int) -> int:
    return min(width, shape[0] * shape[2])
