"""Range losses of many weights at once, with closed-form gradients: one autograd node, few launches, work in cache.

Each loss is a function `_..._rows(x, scalar, grad, scratch)` of R weights of equal size: x [R, n], scalar [R, 1], and
grad [R, n] to be filled, or None. A weight by itself comes as x [n], scalar [1] and grad [n]. It returns the losses
and their derivatives in the scalar, stacked [2, R, 1], and a gain [R, 1] that `grad` lacks (None for 1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 17  # elements handled at once: with their temporaries 2 MB of float32, which stay in cache
SMALL = 1 << 15  # weights of equal size up to this one are stacked and handled together
MANY = 1 << 24  # elements stacked where there is no cache to stay in but launches to save
SAFE_SUM = 1e13  # sums of exponentials up to e^30: far from overflow in float32, and alpha w not yet rounded coarsely
LOWEST_LOGIT = -60.0  # e^-60 is nothing beside 1, and products with it are no denormals, which are slow

Number = Tensor | float
Result = tuple[Tensor, Tensor | None]


def magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """max |w| of each weight, [len(weights)] (ALGORITHMS 1.2); 0 for an empty one.

    The gradient is the sign of the largest weight; equal ones share it, and a weight of zeros gets none.
    """
    none = torch.zeros(len(weights), device=weights[0].device)
    return _Losses.apply(_magnitude_rows, none, *weights)  # type: ignore[return-value]


def excesses(weights: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """size + sum of (|w| - size)+ of each weight, [len(weights)] (ALGORITHMS 1.3); `sizes` >= 0, [len(weights)].

    dL/dw = sign(w) where |w| > size, dL/dsize = 1 - the number of those.
    """
    return _Losses.apply(_excess_rows, sizes, *weights)  # type: ignore[return-value]


def soft_ranges(weights: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """s_max - s_min of each weight (ALGORITHMS 1.4, eq. 1 of S1 without its last term), [len(weights)].

    `weights` are tensors of any shape, `alphas` [len(weights)] the temperatures (> 0). Differentiable in both, once.
    Half precision is computed in float32; the result has the widest dtype among the weights. Empty weights give 0.
    """
    return _Losses.apply(_soft_range_rows, alphas, *weights)  # type: ignore[return-value]


def center_and_spread(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of all, not of a sample) of `w`: two scalars; faster than `torch.std`."""
    flat = w.detach().reshape(-1)
    dtype = _working_dtype(flat)
    mean = flat.sum(dtype=dtype) / max(flat.numel(), 1)
    total = torch.zeros((), dtype=dtype, device=flat.device)
    for part in flat.split(CHUNK if flat.device.type == "cpu" else MANY):
        off = part.to(dtype) - mean
        total += off.dot(off)
    return mean, (total / max(flat.numel(), 1)).sqrt()


class _Losses(torch.autograd.Function):
    """The losses of all weights. Gradients are made in the forward pass, while exponentials are still in cache."""

    @staticmethod
    def forward(ctx: Any, rows: Callable[..., Result], scalars: Tensor, *weights: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        losses, ctx.held = _evaluate(rows, scalars, weights, needed)
        if needed:
            ctx.rows = rows
            ctx.save_for_backward(scalars, *weights)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        held, ctx.held = ctx.held, None  # scaled in place below, so they serve one pass; another makes them anew
        scalars, *weights = ctx.saved_tensors
        slopes, batches = held or _evaluate(ctx.rows, scalars, weights, True)[1]
        grads: list[Tensor | None] = [None] * len(weights)
        each = upstream.view(-1, 1).unbind()
        for indices, grad, gain in batches:
            scale = (each[indices[0]] if len(indices) == 1 else upstream[indices, None]).to(grad.device, grad.dtype)
            grad.mul_(scale if gain is None else scale * gain)
            for i, row in zip(indices, [grad] if len(indices) == 1 else grad, strict=True):
                if ctx.needs_input_grad[i + 2]:
                    grads[i] = row.to(weights[i].dtype).view(weights[i].shape)
        return None, (upstream * slopes if ctx.needs_input_grad[1] else None), *grads


def _evaluate(rows: Callable[..., Result], scalars: Tensor, weights: Sequence[Tensor], needed: bool) -> tuple:
    """Losses [len(weights)], and what their gradient needs: slopes [len(weights)], and gradients batch by batch."""
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    scalars, scratch = scalars.detach(), Scratch()
    each = scalars.view(-1, 1).unbind()
    results, batches, order = [], [], []
    for indices in _batches(weights):
        members = [weights[i].detach().reshape(-1) for i in indices]
        x = members[0] if len(members) == 1 else torch.stack(members)
        scalar = each[indices[0]] if len(members) == 1 else scalars[indices, None]
        scalar = scalar.to(x.device, _working_dtype(x))
        grad = torch.empty_like(x, dtype=scalar.dtype) if needed else None
        result, gain = rows(x, scalar, grad, scratch)
        results.append(result.view(2, -1).to(scalars.device, dtype))
        batches.append((indices, grad, gain))
        order += indices
    losses, slopes = torch.cat(results, dim=1)[:, sorted(range(len(order)), key=order.__getitem__)]
    return losses, (slopes, batches)


def _batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of weights to handle together: small ones of equal size, as many as stay in cache; large ones alone."""
    equal: dict[tuple, list[int]] = defaultdict(list)
    for i, w in enumerate(weights):
        equal[(w.numel(), w.dtype, w.device)].append(i)
    batches = []
    for (numel, _, device), indices in equal.items():
        room, largest = (CHUNK, SMALL) if device.type == "cpu" else (MANY, MANY)
        step = max(1, room // max(numel, 1)) if numel <= largest else 1
        batches += [indices[k : k + step] for k in range(0, len(indices), step)]
    return batches


def _width(x: Tensor) -> int:
    """How many columns of `x` are handled at once."""
    rows = 1 if x.dim() == 1 else x.shape[0]
    return max(1, min(x.shape[-1], (CHUNK if x.device.type == "cpu" else MANY) // rows))


def _parts(x: Tensor, grad: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`x` in `dtype` and its `grad`, in pieces that stay in cache."""
    width = _width(x)
    if width == x.shape[-1]:
        yield x.to(dtype), grad
        return
    for start in range(0, x.shape[-1], width):
        piece = slice(start, start + width)
        yield x[..., piece].to(dtype), None if grad is None else grad[..., piece]


def _working_dtype(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _magnitude_rows(x: Tensor, scalar: Tensor, grad: Tensor | None, scratch: Scratch) -> Result:
    largest, ties = torch.zeros_like(scalar), torch.zeros_like(scalar)
    if x.shape[-1]:
        for part, _ in _parts(x, None, scalar.dtype):
            size, _ = _fitting(scratch(x, scalar.dtype), part)
            largest = torch.maximum(largest, torch.abs(part, out=size).amax(-1, keepdim=True))
    for part, out in _parts(x, grad, scalar.dtype):
        if out is not None:
            torch.abs(part, out=out)
            torch.eq(out, largest, out=out)
            ties += out.sum(-1, keepdim=True)
            out.copysign_(part)
    return torch.stack([largest, torch.zeros_like(largest)]), (largest > 0) / ties.clamp(min=1)


def _excess_rows(x: Tensor, size: Tensor, grad: Tensor | None, scratch: Scratch) -> Result:
    loss, outside = size.clone(), torch.zeros_like(size)
    for part, out in _parts(x, grad, size.dtype):
        excess = _fitting(scratch(x, size.dtype), part)[0] if out is None else out
        torch.abs(part, out=excess).sub_(size).clamp_(min=0)
        loss += excess.sum(-1, keepdim=True)
        if out is not None:
            torch.gt(out, 0, out=out)
            outside += out.sum(-1, keepdim=True)
            out.copysign_(part)
    return torch.stack([loss, 1 - outside]), None


def _soft_range_rows(x: Tensor, scalar: Tensor, grad: Tensor | None, scratch: Scratch) -> Result:
    if not x.shape[-1]:
        return torch.zeros_like(torch.stack([scalar, scalar])), None
    alpha = scalar.item() if _single(x) else scalar
    both = scratch(x, scalar.dtype)
    bounds = None
    z_up, z_down, up_x, down_x = _sums(x, alpha, bounds, both)
    # Checked afterwards, when the sums are at hand; not on other devices, where looking would mean waiting for them.
    if x.device.type != "cpu" or not _all_below(SAFE_SUM, z_up, z_down):
        bounds = torch.aminmax(x.to(scalar.dtype), dim=-1, keepdim=True)
        z_up, z_down, up_x, down_x = _sums(x, alpha, bounds, both)
    s_max, s_min = up_x / z_up, down_x / z_down
    work: Number = 0.0  # sum of x dL/dx
    for part, out in _parts(x, grad, scalar.dtype):
        if out is None:
            break
        up, down = _fitting(both, part)
        if part.shape != x.shape:  # otherwise they are still there
            _exponentials(part, alpha, bounds, up, down)
        # p (1 + alpha (x - s_max)) - q (1 - alpha (x - s_min)), with p = up / z_up and q = down / z_down
        _linear(part, alpha / z_up, (1 - alpha * s_max) / z_up, out).mul_(up)
        _linear(part, alpha / z_down, (-1 - alpha * s_min) / z_down, up)
        work += _dots(part, out.addcmul_(up, down), up)
    # L(x; alpha) = L(k x; alpha / k) / k, so by Euler sum x dL/dx = L + alpha dL/dalpha: one product gives the slope
    result = [s_max - s_min, (work - (s_max - s_min)) / alpha]
    if _single(x):
        return torch.tensor(result, dtype=scalar.dtype), None
    return torch.stack(result), None  # type: ignore[arg-type]


def _sums(x: Tensor, alpha: Number, bounds: Any, both: tuple[Tensor, Tensor]) -> list[Number]:
    """Sums of exp(alpha x) and exp(-alpha x), then of x times each. The last exponentials stay in `both`."""
    sums: list[Number] = [0.0] * 4
    for part, _ in _parts(x, None, both[0].dtype):
        up, down = _fitting(both, part)
        _exponentials(part, alpha, bounds, up, down)
        more = (_totals(up), _totals(down), _dots(part, up), _dots(part, down))
        sums = [total + value for total, value in zip(sums, more, strict=True)]
    return sums


def _exponentials(x: Tensor, alpha: Number, bounds: Any, up: Tensor, down: Tensor) -> None:
    """exp(alpha x) and exp(-alpha x), one the inverse of the other; with `bounds` each divided by its largest one."""
    if bounds is None:
        torch.mul(x, alpha, out=up).exp_()
        torch.reciprocal(up, out=down)
        return
    low, high = bounds
    torch.sub(x, high, out=up).mul_(alpha).clamp_(min=LOWEST_LOGIT).exp_()
    torch.sub(low, x, out=down).mul_(alpha).clamp_(min=LOWEST_LOGIT).exp_()


def _linear(x: Tensor, slope: Number, offset: Number, out: Tensor) -> Tensor:
    """offset + slope x, in one pass where the two are floats."""
    if isinstance(slope, Tensor):
        return torch.mul(x, slope, out=out).add_(offset)
    return torch.add(torch.tensor(offset, dtype=x.dtype), x, alpha=slope, out=out)


def _single(x: Tensor) -> bool:
    """One weight on a CPU: its sums are Python floats, cheaper to calculate with than tensors of one element."""
    return x.dim() == 1 and x.device.type == "cpu"


def _totals(x: Tensor) -> Number:
    """Sum of each row, [R, 1] (a float for a single weight)."""
    return x.sum().item() if _single(x) else x.sum(-1, keepdim=True)


def _dots(a: Tensor, b: Tensor, out: Tensor | None = None) -> Number:
    """Sum of a b row by row, [R, 1] (a float for a single weight); `out` may be overwritten."""
    return torch.dot(a, b).item() if _single(a) else torch.mul(a, b, out=out).sum(-1, keepdim=True)


def _all_below(bound: float, *values: Number) -> bool:
    """False too where a value is NaN."""
    return all(bool((v < bound).all()) if isinstance(v, Tensor) else v < bound for v in values)


def _fitting(both: tuple[Tensor, Tensor], part: Tensor) -> tuple[Tensor, Tensor]:
    """The beginnings of both buffers, in the shape of `part`."""
    if both[0].shape == part.shape:
        return both
    return both[0][..., : part.shape[-1]], both[1][..., : part.shape[-1]]


class Scratch:
    """Two working buffers for each kind of weight, made once a call: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two tensors of any content, in the shape of the pieces of `x`."""
        shape = (*x.shape[:-1], _width(x))
        size = math.prod(shape)
        held = self.buffers.get((dtype, x.device))
        if held is None or held[0].numel() < size:
            held = (torch.empty(size, dtype=dtype, device=x.device), torch.empty(size, dtype=dtype, device=x.device))
            self.buffers[(dtype, x.device)] = held
        return held[0][:size].view(shape), held[1][:size].view(shape)
