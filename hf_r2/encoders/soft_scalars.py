"""Soft clustering of very many scalars by tables: all that is needed is a function of one number.

The weights enter the fixed point through a histogram (counts and true means of its bins). The soft weight f(w), its slope
f'(w), and the share h(w) that a weight's gradient takes of the centroids' are evaluated on evenly spaced nodes and
interpolated linearly, so that the work on the weights themselves does not depend on the number of clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_r2.encoders.attention import CHUNK as TOGETHER
from hf_r2.encoders.attention import Attention, attention
from hf_r2.encoders.soft_cluster import fixed_point, jacobian, pulled_back, update

CHUNK = 1 << 16  # weights at once: they stay in cache
FEWEST, MOST = 1 << 12, 1 << 18  # bins
FINENESS = 0.04  # of a bin, in units of tau over the mean gap between centroids: the width of a soft step


@dataclass(frozen=True)
class Nodes:
    """`bins` + 1 evenly spaced nodes from `low` on, `width` apart."""

    low: float
    width: float
    bins: int

    @classmethod
    def over(cls, w: Tensor, centroids: Tensor, tau: float) -> Nodes | None:
        """Nodes over the range of `w`, close enough for the steps of f; None where that takes too many."""
        low, high = (float(end) for end in w.aminmax())
        gap = float(centroids.max() - centroids.min()) / max(len(centroids) - 1, 1)
        wanted = max((high - low) * gap / (FINENESS * tau), FEWEST)
        if not wanted <= min(MOST, len(w) / 2):
            return None
        bins = 1 << math.ceil(math.log2(wanted))
        return cls(low, max((high - low) / bins, 1e-30), bins)

    def positions(self, like: Tensor) -> Tensor:
        """The nodes [1, bins + 1]."""
        return (torch.arange(self.bins + 1, device=like.device, dtype=like.dtype) * self.width + self.low)[None]

    def places(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the bin of each weight, int32, and where in it, 0 to 1."""
        place = (w - self.low) * (1 / self.width)
        index = place.to(torch.int32).clamp_(0, self.bins - 1)
        return index, place.sub_(index)


def _pieces(w: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(t.split(CHUNK) for t in (w, *others)), strict=True)


def _columns(k: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors [1, n] for k rows of attention."""
    yield from zip(*(t.split(max(1, TOGETHER // k), dim=1) for t in rows), strict=True)


def histogram(w: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """Weights in each bin and their mean, [bins] each; an empty bin has its middle."""
    count = torch.zeros(nodes.bins, dtype=torch.int64, device=w.device)
    total = torch.zeros(nodes.bins, dtype=torch.float64, device=w.device)
    for (part,) in _pieces(w):
        index, inside = nodes.places(part)
        count += torch.bincount(index, minlength=nodes.bins)
        total += torch.bincount(index, weights=inside, minlength=nodes.bins)
    inside = torch.where(count > 0, total / count.clamp(min=1), 0.5)
    start = torch.arange(nodes.bins, device=w.device, dtype=torch.float64)
    return count.to(w.dtype), ((start + inside) * nodes.width + nodes.low).to(w.dtype)


def pulls(x: Tensor, c: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """At points [1, n]: f, f' and df/dc_j = a_j (1 + 2/tau (x - c_j) (c_j - f)), [1, n], [n], [k, n]."""
    a = attention(x, c, tau)
    f = c.T @ a
    off = c - f  # [k, n]
    slope = (a * off.square()).sum(0) * (2 / tau)
    return f, slope, a * (1 + (2 / tau) * (x - c) * off)


def interpolated(table: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """Linear between the nodes of `table` [bins + 1]."""
    return torch.lerp(table.index_select(0, index), table[1:].index_select(0, index), inside)


class SoftScalars(torch.autograd.Function):
    """As `SoftCluster`, for w [m, 1] and start [k, 1], on the `nodes` for these."""

    @staticmethod
    def forward(ctx, w, centroids, tau, max_iter, still, nodes):
        flat = w[:, 0]
        mass, means = histogram(flat, nodes)
        held = mass > 0
        seen = Attention(means[held][None, None], mass[held])
        centroids, ctx.steps = fixed_point(lambda c: update(seen, c, tau)[0], centroids, still, max_iter)
        drawn = update(seen, centroids, tau)[1]
        table, soft = _soft_table(nodes.positions(w), centroids, tau), torch.empty_like(w)
        for part, out in _pieces(flat, soft[:, 0]):
            out.copy_(interpolated(table, *nodes.places(part)))
        ctx.save_for_backward(w, centroids, drawn, mass, means)
        ctx.tau, ctx.nodes = tau, nodes
        ctx.mark_non_differentiable(drawn)
        return soft, centroids, drawn

    @staticmethod
    def backward(ctx, grad_soft, grad_centroids, _):
        w, c, drawn, mass, means = ctx.saved_tensors
        nodes, tau, flat, grads = ctx.nodes, ctx.tau, w[:, 0], grad_soft[:, 0]
        pulled = torch.zeros(nodes.bins, dtype=torch.float64, device=w.device)
        for part, grad in _pieces(flat, grads):
            pulled += torch.bincount(nodes.places(part)[0], weights=grad, minlength=nodes.bins)
        held = mass > 0
        points = means[held][None]
        g = grad_centroids.clone()
        for x, pull in _columns(len(c), points, pulled[held].to(w.dtype)[None]):
            g.addmm_(pulls(x, c, tau)[2], pull.T)
        seen = Attention(points[None], mass[held])
        u = pulled_back(jacobian(seen, c, tau), g, ctx.steps) / drawn.clamp(min=1e-30)[:, None]
        parts = [pulls(x, c, tau) for (x,) in _columns(len(c), nodes.positions(w))]
        slope = torch.cat([part[1] for part in parts])
        share = torch.cat([(u.T @ part[2])[0] for part in parts])
        result = torch.empty_like(w)
        for part, grad, out in _pieces(flat, grads, result[:, 0]):
            places = nodes.places(part)
            torch.addcmul(interpolated(share, *places), grad, interpolated(slope, *places), out=out)
        return result, None, None, None, None, None


def _soft_table(x: Tensor, c: Tensor, tau: float) -> Tensor:
    return torch.cat([(c.T @ attention(part, c, tau))[0] for (part,) in _columns(len(c), x)])
