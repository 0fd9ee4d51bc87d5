"""Soft clustering of vectors and its gradient at the fixed point, in chunks: no attention map is ever stored.

Repeats C <- mean of the points under the attention softmax(-|w - c|² / tau) (DKM, arXiv:2108.12659), until nothing moves;
the result is W~ = A C. The gradient is that of the fixed point (IDKM, arXiv:2312.07759; ALGORITHMS 2.7): a (k d) x (k d)
linear solve, however many iterations there were. Where the iterations ran out before, it is that of so many steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hf_r2.encoders.attention import Attention, put

logger = logging.getLogger(__name__)

SINGULAR = 1e6  # condition number of I - dF/dC from which the solve is not trusted
FEW = 4  # steps that are unrolled one by one, where dF/dC as a whole would cost more
NOTHING = 1e-18  # attention drawn that is as good as none: far above what the least attention adds up to


def update(seen: Attention, centroids: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One step: the new centroids [k, d] and the attention they drew, [k]. A centroid that draws none stays."""
    k, d = centroids.shape
    total = centroids.new_zeros(k, d + 1)
    for part, _ in seen.parts(centroids, tau):
        total.addmm_(part.raw, part.points.mul_(part.weight).T)
    drawn = total[:, d]
    return torch.where(drawn[:, None] > NOTHING, total[:, :d] / drawn.clamp(min=NOTHING)[:, None], centroids), drawn


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


def jacobian(seen: Attention, centroids: Tensor, tau: float) -> Tensor:
    """dF/dC at the fixed point, [k d, k d] in float64 (ALGORITHMS 2.7, with F = C)."""
    k, d = centroids.shape
    cross = centroids.new_zeros(k * d, k * d, dtype=torch.float64)
    moments = centroids.new_zeros(k, 1 + d + d * d, dtype=torch.float64)  # of the points, as each centroid draws them
    for part, _ in seen.parts(centroids, tau):
        a, p, mass = part.raw.mul_(part.norm), part.points[:d], part.weight / part.norm
        powers = torch.cat([torch.ones_like(p[:1]), p, (p[:, None] * p).flatten(0, 1)])
        offset = (p - centroids[:, :, None]).mul_(a[:, None]).flatten(0, 1)  # a_ij (p_i - c_j), [k d, n]
        moments += a @ (powers * mass).T
        cross += (offset * mass) @ offset.T
    drawn, first, c = moments[:, 0], moments[:, 1 : 1 + d], centroids.double()
    second = moments[:, 1 + d :].view(k, d, d)
    outer = first[:, :, None] * c[:, None, :]
    same = second - outer - outer.mT + drawn[:, None, None] * c[:, :, None] * c[:, None, :]
    result = torch.block_diag(*same) - cross
    return result * (2 / tau) / drawn.clamp(min=1e-30).repeat_interleave(d)[:, None]


def pulled_back(dfdc: Tensor, g: Tensor, steps: int | None) -> Tensor:
    """What a gradient g [k, d] for the centroids is for their last update.

    At the fixed point (`steps` None) (I - dF/dC)^-T g; where that is near singular (tau close to the critical value), g: one
    unrolled step. Else the sum of the first `steps` terms of its series, as unrolling so many steps gives; where that grows
    (the iterations ended on the way out of an unstable point, and the dF/dC of their end is not that of all), g again.
    """
    if steps is not None:
        term = result = g.double().flatten()
        for _ in range(steps - 1):
            term = dfdc.T @ term
            result = result + term
        if not float(term.norm()) <= float(g.norm()):
            logger.warning(
                "DKM: the iterations of a layer ran out where they do not settle; one unrolled step is used"
            )
            return g
        return result.view_as(g).to(g.dtype)
    system = torch.eye(dfdc.shape[0], dtype=dfdc.dtype, device=dfdc.device) - dfdc
    if not torch.isfinite(system).all() or float(torch.linalg.cond(system)) > SINGULAR:
        logger.warning("DKM: tau is close to the critical value of a layer; the gradient of one unrolled step is used")
        return g
    return torch.linalg.solve(system.T, g.double().flatten()).view_as(g).to(g.dtype)


class SoftCluster(torch.autograd.Function):
    """Points [b, d, n] (b times n), start [k, d], tau, max_iter, still to soft points, centroids and what each drew, [k]."""

    @staticmethod
    def forward(ctx, points, centroids, tau, max_iter, still):
        seen = Attention(points)
        centroids, ctx.steps = fixed_point(lambda c: update(seen, c, tau)[0], centroids, still, max_iter)
        soft, total = torch.empty_like(points), centroids.new_zeros(len(centroids), centroids.shape[1] + 1)
        for part, where in seen.parts(centroids, tau):
            put((centroids.T @ part.raw).mul_(part.norm), soft[where])
            total.addmm_(part.raw, part.points.mul_(part.norm).T)
        drawn = total[:, -1].clone()
        ctx.save_for_backward(points, centroids, drawn, seen.shift, seen.reference)
        ctx.tau, ctx.length = tau, seen.length
        ctx.mark_non_differentiable(drawn)
        return soft, centroids, drawn

    @staticmethod
    def backward(ctx, grad_soft, grad_centroids, _):
        points, c, drawn, shift, reference = ctx.saved_tensors
        tau, factor, share = ctx.tau, 2 / ctx.tau, 1 / drawn.clamp(min=NOTHING)[:, None]
        seen = Attention(points)
        seen.shift, seen.reference, seen.length = shift, reference, ctx.length
        g, pulled = grad_centroids.clone(), c.new_zeros(len(c), c.shape[1] + 1)
        for part, _ in seen.parts(c, tau, grad_soft):
            (grad,) = part.others
            pulled.addmm_(part.centred(c, grad), part.points.mul_(part.norm).T)
            g.addmm_(part.raw, grad.mul_(part.norm).T)
        g += _about(pulled, c) * factor
        if ctx.steps is not None and ctx.steps <= FEW:
            term = u = g
            for _ in range(ctx.steps - 1):
                term = _one_step_back(seen, c, term * share, tau)
                u = u + term
        else:
            u = pulled_back(jacobian(seen, c, tau), g, ctx.steps)
        u = u * share
        result, left, down = (
            torch.empty_like(points),
            torch.cat([c, _heights(u, c)], 1),
            torch.cat([u, c * factor], 1).T,
        )
        for part, where in seen.parts(c, tau, grad_soft):
            (grad,) = part.others
            right = torch.cat([grad, part.points])
            out = down[: len(grad)] @ part.raw
            out.addmm_(down[len(grad) :], part.centred(left, right)).mul_(part.norm)
            put(out, result[where])
        return result, None, None, None, None


def _one_step_back(seen: Attention, c: Tensor, u: Tensor, tau: float) -> Tensor:
    """(dF/dC)^T times u (already divided by what each centroid drew), [k, d], without dF/dC."""
    result = c.new_zeros(len(c), c.shape[1] + 1)
    left = _heights(u, c)
    for part, _ in seen.parts(c, tau):
        b = part.centred(left, part.points)
        result.addmm_(b, part.points.mul_(part.norm).T)
    return _about(result, c) * (2 / tau)


def _heights(u: Tensor, c: Tensor) -> Tensor:
    """u_j (p_i - c_j) as a function of the point p_i and one, [k, d + 1]."""
    return torch.cat([u, -(u * c).sum(1, keepdim=True)], 1)


def _about(sums: Tensor, c: Tensor) -> Tensor:
    """Sums of b_ji (p_i - c_j) from those of b_ji p_i and b_ji, [k, d + 1]."""
    return sums[:, :-1] - sums[:, -1:] * c
