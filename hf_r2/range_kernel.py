"""Soft minimum and maximum of many weights with their closed-form gradient: one autograd node, few launches, no copies.

exp(-alpha w) is 1 / exp(alpha w): as long as neither overflows, one exponential serves both sides. Otherwise each side is
shifted by its own extreme (two softmaxes).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights handled at once: 512 kB of float32 and its temporaries stay in cache
SMALL = 1 << 14  # weights of equal size up to this one are stacked and handled together


def soft_ranges(weights: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """s_max - s_min of each weight (ALGORITHMS 1.4, eq. 1 of S1 without its last term), [len(weights)].

    `weights` are tensors of any shape, `alphas` [len(weights)] the temperatures (> 0). Differentiable in both, once.
    Half precision is computed in float32; the result has the widest dtype among the weights. Empty weights give 0.
    """
    return _SoftRanges.apply(alphas, *weights)  # type: ignore[return-value]


class _SoftRanges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alphas: Tensor, *weights: Tensor) -> Tensor:
        dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
        result = torch.zeros(len(weights), dtype=dtype, device=alphas.device)
        slopes = torch.zeros_like(result)  # d/d alpha
        grads: list[Tensor | None] = [None] * len(weights)
        temperatures = alphas.detach().to(dtype)
        for indices in _batches(weights):
            rows = [weights[i].detach().reshape(-1) for i in indices]
            alpha = temperatures[indices]
            if len(indices) > 1:
                value, slope, grad = _small(torch.stack(rows).to(dtype), alpha)
                for i, g in zip(indices, grad, strict=True):
                    grads[i] = g
            else:
                value, slope, grads[indices[0]] = _large(rows[0].to(dtype), alpha[0])
            result[indices], slopes[indices] = value, slope
        ctx.buffers = (slopes, *[g for g in grads if g is not None])
        ctx.spent = False
        ctx.held = [g is not None for g in grads]
        ctx.like = [(w.shape, w.dtype) for w in weights]
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        slopes, *held = ctx.buffers
        if ctx.spent:
            raise RuntimeError("the range loss keeps its gradient for one backward pass; call it again for another")
        ctx.spent = True  # the buffers are scaled in place: a second copy of all gradients would cost as much again
        stored = iter(held)
        scales = list(grad.unbind())
        grads = []
        for has, scale, (shape, dtype), needed in zip(
            ctx.held, scales, ctx.like, ctx.needs_input_grad[1:], strict=True
        ):
            g = next(stored) if has else None
            if not needed:
                grads.append(None)
            elif g is None:
                grads.append(torch.zeros(shape, dtype=dtype, device=grad.device))
            else:
                grads.append(g.mul_(scale).to(dtype).view(shape))
        return (grad * slopes, *grads)


def _batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of weights to handle together: small ones of equal size, a cache full at a time; large ones alone."""
    equal: dict[tuple, list[int]] = defaultdict(list)
    alone: list[list[int]] = []
    for i, w in enumerate(weights):
        if w.numel() > SMALL:
            alone.append([i])
        elif w.numel():
            equal[(w.numel(), w.device)].append(i)
    batches = []
    for (numel, _), indices in equal.items():
        step = max(1, CHUNK // numel)
        batches += [indices[k : k + step] for k in range(0, len(indices), step)]
    return batches + alone


def _small(w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Range, its slope in alpha, and its gradient for stacked weights [B, n], all in cache."""
    a = alpha[:, None]
    low, high = w.aminmax(
        dim=1, keepdim=True
    )  # subtracted before the product: alpha w would be rounded at its full size
    up = torch.softmax(a * (w - high), dim=1)
    down = torch.softmax(a * (low - w), dim=1)
    s_max, s_min = (up * w).sum(1, keepdim=True), (down * w).sum(1, keepdim=True)
    slope = (up * (w - s_max).square()).sum(1) + (down * (w - s_min).square()).sum(1)
    grad = up * (1 + a * (w - s_max)) - down * (1 - a * (w - s_min))
    return (s_max - s_min)[:, 0], slope, grad


def _large(w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one weight [n], in chunks that stay in cache, with one exponential where nothing overflows."""
    if w.device.type != "cpu":  # no host synchronisation there
        value, slope, grad = _small(w[None], alpha[None])
        return value[0], slope[0], grad[0]
    grad = torch.empty_like(w)
    a = float(alpha)
    sums = _one_exponential(w, a, grad)
    if not all(map(math.isfinite, sums)):
        value, slope, shifted = _small(w[None], alpha[None])
        return value[0], slope[0], shifted[0]
    n_up, up_x, up_xx, n_down, down_x, down_xx = sums
    s_max, s_min = up_x / n_up, down_x / n_down
    slope = (up_xx / n_up - s_max * s_max) + (down_xx / n_down - s_min * s_min)
    # gradient = up (c0 + c1 x) - down (d0 - d1 x), with the constants of the closed form
    c0, c1 = (1 - a * s_max) / n_up, a / n_up
    d0, d1 = (1 + a * s_min) / n_down, a / n_down
    for x, e in zip(w.split(CHUNK), grad.split(CHUNK), strict=True):
        down = e.reciprocal()
        e.mul_(torch.mul(x, c1).add_(c0)).add_(down.mul_(torch.mul(x, d1).sub_(d0)))
    return w.new_tensor(s_max - s_min), w.new_tensor(slope), grad


def _one_exponential(w: Tensor, alpha: float, out: Tensor) -> list[float]:
    """Sums of e, e x, e x^2 and of their mirror images 1/e, with e = exp(alpha x) left in `out`; inf on overflow."""
    sums = [0.0] * 6
    for x, e in zip(w.split(CHUNK), out.split(CHUNK), strict=True):
        torch.mul(x, alpha, out=e)
        e.exp_()
        down = e.reciprocal()
        up_x, down_x = e * x, down * x
        parts = (e.sum(), up_x.sum(), up_x.dot(x), down.sum(), down_x.sum(), down_x.dot(x))
        sums = [total + part.item() for total, part in zip(sums, parts, strict=True)]
    return sums
