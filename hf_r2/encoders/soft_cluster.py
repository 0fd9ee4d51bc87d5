"""Soft clustering of vectors and its gradient at the fixed point, in chunks: no attention map is ever stored.

Repeats C <- mean of the points under the attention softmax(-|w - c|² / tau) (DKM, arXiv:2108.12659), until nothing moves;
the result is W~ = A C. The gradient is that of the fixed point (IDKM, arXiv:2312.07759; ALGORITHMS 2.7): a (k d) x (k d)
linear solve, however many iterations there were. Where the iterations ran out before, it is that of so many steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHUNK = 1 << 17  # elements of attention computed at once: they stay in cache
SMALLEST = 1e-30  # attention below is raised to it: denormal numbers are slow and mean nothing
SINGULAR = 1e6  # condition number of I - dF/dC from which the solve is not trusted
FEW = 4  # steps that are unrolled one by one, where dF/dC as a whole would cost more


def attention(points: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Columns softmax_j(-|p_i - c_j|² / tau), [k, n], of points in columns [d, n]; the term |p_i|² cancels."""
    squares = centroids.square().sum(1, keepdim=True)
    logits = torch.addmm(squares * (-1 / tau), centroids * (2 / tau), points)
    return torch.softmax(logits, dim=0).clamp_(min=SMALLEST)


def chunks(k: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors with as many columns, narrow enough for k rows of attention."""
    yield from zip(*(t.split(max(1, CHUNK // k), dim=1) for t in columns), strict=True)


def update(points: Tensor, mass: Tensor | None, centroids: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One step: the new centroids [k, d] and the attention they drew, [k]. A centroid that draws none stays.

    `points` [d, n]; `mass` [1, n]: how many points each stands for, None for one.
    """
    k, d = centroids.shape
    total = centroids.new_zeros(k, d + 1)
    with_one = torch.cat([points, torch.ones_like(points[:1])])
    for p, one in chunks(k, points, with_one if mass is None else with_one * mass):
        total += attention(p, centroids, tau) @ one.T
    drawn = total[:, d]
    floor = 1e-18  # far above what the clamp of the attention adds up to
    return torch.where(drawn[:, None] > floor, total[:, :d] / drawn.clamp(min=floor)[:, None], centroids), drawn


def fixed_point(
    step: Callable[[Tensor], Tensor], centroids: Tensor, still: float, max_iter: int
) -> tuple[Tensor, int | None]:
    """Where repeating `step` ends: when no centroid moved by more than `still`, or after `max_iter` times.

    Returns the centroids, and None or, where it was not still by then, the number of steps.
    """
    for _ in range(max_iter):
        moved = step(centroids)
        distance = float((moved - centroids).detach().abs().max())
        centroids = moved
        if distance <= still:
            return centroids, None
    return centroids, max_iter


def jacobian(points: Tensor, mass: Tensor | None, centroids: Tensor, tau: float) -> Tensor:
    """dF/dC at the fixed point, [k d, k d] in float64 (ALGORITHMS 2.7, with F = C)."""
    k, d = centroids.shape
    cross = centroids.new_zeros(k * d, k * d, dtype=torch.float64)
    moments = centroids.new_zeros(k, 1 + d + d * d, dtype=torch.float64)  # of the points, as each centroid draws them
    for p, m in chunks(k, points, torch.ones_like(points[:1]) if mass is None else mass):
        a = attention(p, centroids, tau)
        powers = torch.cat([torch.ones_like(m), p, (p[:, None] * p).flatten(0, 1)])
        offset = (p - centroids[:, :, None]).mul_(a[:, None]).flatten(0, 1)  # a_ij (p_i - c_j), [k d, n]
        cross += (offset if mass is None else offset * m) @ offset.T
        moments += a @ (powers if mass is None else powers * m).T
    drawn, first, c = moments[:, 0], moments[:, 1 : 1 + d], centroids.double()
    second = moments[:, 1 + d :].view(k, d, d)
    outer = first[:, :, None] * c[:, None, :]
    same = second - outer - outer.mT + drawn[:, None, None] * c[:, :, None] * c[:, None, :]
    result = torch.block_diag(*same) - cross
    return result * (2 / tau) / drawn.clamp(min=1e-30).repeat_interleave(d)[:, None]


def pulled_back(dfdc: Tensor, g: Tensor, steps: int | None) -> Tensor:
    """What a gradient g [k, d] for the centroids is for their last update.

    At the fixed point (`steps` None) (I - dF/dC)^-T g; where that is near singular (tau close to the critical value), g: one
    unrolled step. Else the sum of the first `steps` terms of its series, as unrolling so many steps gives.
    """
    if steps is not None:
        term = result = g.double().flatten()
        for _ in range(steps - 1):
            term = dfdc.T @ term
            result = result + term
        return result.view_as(g).to(g.dtype)
    system = torch.eye(dfdc.shape[0], dtype=dfdc.dtype, device=dfdc.device) - dfdc
    if not torch.isfinite(system).all() or float(torch.linalg.cond(system)) > SINGULAR:
        logger.warning("DKM: tau is close to the critical value of a layer; the gradient of one unrolled step is used")
        return g
    return torch.linalg.solve(system.T, g.double().flatten()).view_as(g).to(g.dtype)


class SoftCluster(torch.autograd.Function):
    """(w [m, d], start [k, d], tau, max_iter, still) to soft weights [m, d], centroids [k, d] and what each drew, [k]."""

    @staticmethod
    def forward(ctx, w, centroids, tau, max_iter, still):
        points = w.T.contiguous()
        centroids, ctx.steps = fixed_point(lambda c: update(points, None, c, tau)[0], centroids, still, max_iter)
        soft, drawn = torch.empty_like(w), w.new_zeros(len(centroids))
        for p, out in chunks(len(centroids), points, soft.T):
            a = attention(p, centroids, tau)
            torch.mm(a.T, centroids, out=out.T)
            drawn += a.sum(1)
        ctx.save_for_backward(w, centroids, drawn)
        ctx.tau = tau
        ctx.mark_non_differentiable(drawn)
        return soft, centroids, drawn

    @staticmethod
    def backward(ctx, grad_soft, grad_centroids, _):
        w, c, drawn = ctx.saved_tensors
        k, factor, points, grads = len(c), 2 / ctx.tau, w.T.contiguous(), grad_soft.T.contiguous()
        g, direct = grad_centroids.clone(), torch.empty_like(points)
        for p, grad, out in chunks(k, points, grads, direct):
            a = attention(p, c, ctx.tau)
            b = _centered(a, c @ grad)
            torch.mm(c.T * factor, b, out=out)
            g.addmm_(a, grad.T).addmm_(b, p.T, alpha=factor).sub_(b.sum(1, keepdim=True) * (c * factor))
        share = 1 / drawn.clamp(min=SMALLEST)[:, None]
        if ctx.steps is not None and ctx.steps <= FEW:
            term = u = g
            for _ in range(ctx.steps - 1):
                term = _one_step_back(points, c, term * share, ctx.tau)
                u = u + term
        else:
            u = pulled_back(jacobian(points, None, c, ctx.tau), g, ctx.steps)
        u = u * share
        for p, out in chunks(k, points, direct):
            a = attention(p, c, ctx.tau)
            out.addmm_(u.T, a)
            out.addmm_(c.T, _centered(a, _heights(p, c, u)), alpha=factor)
        return direct.T, None, None, None, None


def _one_step_back(points: Tensor, c: Tensor, u: Tensor, tau: float) -> Tensor:
    """(dF/dC)^T times u (already divided by what each centroid drew), [k, d], without dF/dC."""
    result = torch.zeros_like(c)
    for (p,) in chunks(len(c), points):
        b = _centered(attention(p, c, tau), _heights(p, c, u))
        result.addmm_(b, p.T).sub_(b.sum(1, keepdim=True) * c)
    return result * (2 / tau)


def _heights(p: Tensor, c: Tensor, u: Tensor) -> Tensor:
    """u_j (p_i - c_j), [k, n]."""
    return torch.addmm(-(u * c).sum(1, keepdim=True), u, p)


def _centered(a: Tensor, v: Tensor) -> Tensor:
    """a * (v - sum_j a v): what the softmax's gradient does to `v`; overwrites it."""
    return v.sub_((a * v).sum(0)).mul_(a)
