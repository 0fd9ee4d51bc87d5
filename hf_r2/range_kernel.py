"""Soft minimum and maximum of many weights with their closed-form gradient: one autograd node, few launches, no copies.

exp(-alpha w) is 1 / exp(alpha w): while alpha |w| stays small, one exponential serves both sides. Beyond that each side
is shifted by its own extreme, so that nothing overflows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 16  # weights handled at once: 256 kB of float32 stays in cache
SMALL = 1 << 14  # weights of equal size up to this one are stacked and handled together
SAFE = 30.0  # exp of +-30 summed over billions of weights stays far inside float32


def soft_ranges(weights: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """s_max - s_min of each weight (ALGORITHMS 1.4, eq. 1 of S1 without its last term), [len(weights)].

    `weights` are tensors of any shape, `alphas` [len(weights)] the temperatures (> 0). Differentiable in both, once.
    Half precision is computed in float32; the result has the widest dtype among the weights. Empty weights give 0.
    """
    return _SoftRanges.apply(alphas, *weights)  # type: ignore[return-value]


class _SoftRanges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alphas: Tensor, *weights: Tensor) -> Tensor:  # noqa: ANN001
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
        ctx.save_for_backward(slopes, *[g for g in grads if g is not None])
        ctx.held = [g is not None for g in grads]
        ctx.like = [(w.shape, w.dtype) for w in weights]
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205
        slopes, *held = ctx.saved_tensors
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
                grads.append((g * scale).to(dtype).view(shape))
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
    up = torch.softmax(a * w, dim=1)
    down = torch.softmax(-a * w, dim=1)
    s_max, s_min = (up * w).sum(1, keepdim=True), (down * w).sum(1, keepdim=True)
    slope = (up * (w - s_max).square()).sum(1) + (down * (w - s_min).square()).sum(1)
    grad = up * (1 + a * (w - s_max)) - down * (1 - a * (w - s_min))
    return (s_max - s_min)[:, 0], slope, grad


def _large(w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one weight [n], in chunks that stay in cache; the gradient buffer holds the exponentials meanwhile."""
    low, high = w.aminmax()
    shared = bool(alpha * torch.maximum(high, -low) <= SAFE)  # one exponential serves both sides
    grad = torch.empty_like(w)
    zero = (torch.zeros_like(high), torch.zeros_like(high)) if shared else (high, low)
    sums = torch.zeros(6, dtype=torch.float64, device=w.device)
    for x, e in zip(w.split(CHUNK), grad.split(CHUNK), strict=True):
        up, down = _exponentials(x, alpha, zero, shared, e)
        ux, dx = up * x, down * x
        sums += torch.stack([up.sum(), ux.sum(), ux.dot(x), down.sum(), dx.sum(), dx.dot(x)]).double()
    n_up, n_down = sums[0], sums[3]
    s_max, s_min = sums[1] / n_up, sums[4] / n_down
    slope = (sums[2] / n_up - s_max.square()) + (sums[5] / n_down - s_min.square())
    a = alpha.double()
    # gradient = up (c0 + c1 x) - down (d0 - d1 x), with the constants of the closed form
    c0, c1 = ((1 - a * s_max) / n_up).to(w.dtype), (a / n_up).to(w.dtype)
    d0, d1 = ((1 + a * s_min) / n_down).to(w.dtype), (a / n_down).to(w.dtype)
    for x, e in zip(w.split(CHUNK), grad.split(CHUNK), strict=True):
        down = e.reciprocal() if shared else torch.exp(alpha * (zero[1] - x))
        e.mul_(torch.addcmul(c0, c1, x)).sub_(down.mul_(torch.addcmul(d0, d1, x, value=-1)))
    return (s_max - s_min).to(w.dtype), slope.to(w.dtype), grad


def _exponentials(x: Tensor, alpha: Tensor, zero: tuple[Tensor, Tensor], shared: bool, out: Tensor) -> tuple[Tensor, Tensor]:
    if shared:
        torch.mul(x, alpha, out=out).exp_()
        return out, out.reciprocal()
    torch.sub(x, zero[0], out=out).mul_(alpha).exp_()
    return out, torch.exp(alpha * (zero[1] - x))
