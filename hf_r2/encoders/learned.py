"""Rounding to a grid whose scale is learned: values of `hf_r2.grid`, gradients of LSQ (arXiv:1902.08153, eq. 3 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_r2.grid import dequantize

SMALLEST = 1e-8  # scales are kept at least this large: a negative one would turn the signs of all levels


def learned_codes(x: Tensor, scale: Tensor, zero_point: Tensor | float, qmax: int) -> Tensor:
    """Codes 0..qmax of `x`, uint8: the nearest level (ties to even)."""
    return (x / scale + zero_point).round().clamp(0, qmax).to(torch.uint8)


def learned_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, qmax: int, factor: float) -> Tensor:
    """`x` on the levels (code - zero_point) * scale, codes 0..qmax; in its dtype, computed in that of `scale`.

    `scale` > 0, broadcastable to `x`. Gradients, with u = x / scale: for `x` 1 where 0 < u + zero_point < qmax, else 0; for
    `scale` `factor` times the sum of (level / scale - u) inside and of the clipped level / scale outside (LSQ's
    factor: 1 / sqrt(elements x largest level), section 2.2).
    """
    return _LearnedQuantize.apply(x, scale, zero_point, qmax, factor)  # type: ignore[return-value]


class _LearnedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor | float, qmax: int, factor: float) -> Tensor:
        wide = x.to(scale.dtype)
        point = torch.as_tensor(zero_point, dtype=scale.dtype, device=scale.device)
        value = dequantize(learned_codes(wide, scale, point, qmax), scale, point)
        ctx.save_for_backward(x, value, scale, point)
        ctx.qmax, ctx.factor = qmax, factor
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, value, scale, point = ctx.saved_tensors
        inside = (x > -point * scale) & (x < (ctx.qmax - point) * scale)
        passed = grad * inside
        slope = None
        if ctx.needs_input_grad[1]:
            # Sum of level / scale everywhere, less u inside: one pass over products instead of one over differences.
            wide = grad.to(scale.dtype)
            slope = torch.addcmul(wide * value, passed.to(scale.dtype), x.to(scale.dtype), value=-1)
            slope = slope.sum_to_size(scale.shape) * (ctx.factor / scale)
        return passed, slope, None, None, None


def kept_positive_(scale: Tensor) -> Tensor:
    """Puts a learned scale that an optimizer step made too small back to its bound, in place; returns it in float32."""
    with torch.no_grad():
        scale.clamp_(min=SMALLEST)
    return scale.float().clamp(min=SMALLEST)  # the bound is 0 in float16
