"""An input quantizer whose step is trained, with quantization dropped at random (QDrop, arXiv:2203.05740)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.encoders.activations import InputQuantizer


class LearnedStep(nn.Module):
    """Stands in for a static input quantizer while it is trained: parameter `scale`, the zero point stays.

    `keep`: the probability with which an element is quantized; 1 always quantizes. Random numbers come from `generator`.
    """

    def __init__(self, quantizer: InputQuantizer, generator: torch.Generator):
        super().__init__()
        assert quantizer.scale is not None and quantizer.zero_point is not None
        self.quantizer, self.keep, self.generator = quantizer, 1.0, generator
        self.zero_point = int(quantizer.zero_point)
        self.scale = nn.Parameter(quantizer.scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x` quantized, but for the elements that are dropped."""
        value = learned_quantize(x, self.scale, self.zero_point, self.quantizer.grid.qmax)
        return value if self.keep >= 1 else torch.where(drawn(x, self.keep, self.generator), value, x)

    def settle_(self) -> InputQuantizer:
        """Gives the learned step to the quantizer, in place, and returns it."""
        self.quantizer.scale = self.scale.detach().clamp(min=1e-8)
        return self.quantizer


def learned_quantize(x: Tensor, scale: Tensor, zero_point: int, qmax: int) -> Tensor:
    """`x` on the grid of codes 0..qmax, in its dtype, with LSQ's gradients (arXiv:1902.08153, eq. 3 and 5).

    For `x` that of the clamp; for `scale` the sum over all elements of (x_hat - x) / scale inside the range and of
    x_hat / scale outside, times 1 / sqrt(numel qmax).
    """
    return _LearnedQuantize.apply(x, scale, zero_point, qmax)  # type: ignore[return-value]


class _LearnedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: int, qmax: int) -> Tensor:
        step = float(scale.clamp(min=1e-8))
        value = torch.fake_quantize_per_tensor_affine(x.float(), step, zero_point, 0, qmax)
        ctx.save_for_backward(x, value)
        ctx.step, ctx.low, ctx.high = step, (0 - zero_point - 0.5) * step, (qmax - zero_point + 0.5) * step
        ctx.factor = (x.numel() * qmax) ** -0.5
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, value = ctx.saved_tensors
        inside = grad * ((x >= ctx.low) & (x <= ctx.high))
        slope = torch.dot(grad.float().flatten(), value.flatten()) - torch.dot(
            inside.float().flatten(), x.float().flatten()
        )
        return inside, slope * (ctx.factor / ctx.step), None, None


def drawn(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """True with probability `share` for each element of a sample, the same for all samples: drawing costs more than computing.

    Drawn on the CPU, so that every device sees the same.
    """
    return (torch.rand(x.shape[1:], generator=generator) < share).to(x.device)
