"""Learned step size quantization (LSQ, Esser et al. 2020, arXiv:1902.08153) of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, said_of
from hf_r2.encoders.learned import SMALLEST, kept_positive_, learned_codes, learned_quantize
from hf_r2.grid import Grid
from hf_r2.spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class LSQOptions:
    """Options of `LSQ` and of the input quantizers that go with it.

    `offset`: inputs get a learned offset beside their step (LSQ+, arXiv:2004.09576); weights never do.
    """

    offset: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.offset, bool):
            raise ValueError(f"offset must be true or false, got {self.offset!r}")


def largest_level(bits: int, signed: bool = True) -> int:
    """Q_p, in steps: 2**(bits-1) - 1 (signed) or 2**bits - 1; 1 for the one-bit grid of plus and minus."""
    return max(2 ** (bits - 1) - 1, 1) if signed else 2**bits - 1


class LSQ(nn.Module):
    """Levels -2**(b-1) .. 2**(b-1) - 1 times a learned step; at 1 bit plus and minus half the step.

    Parameter `scale`, float32, broadcastable to the weight: one, or one for each output channel; starts at
    2 mean|w| / sqrt(Q_p). Its gradient is divided by sqrt(weights per step x Q_p). Options: `LSQOptions`.
    """

    def __init__(self, weight: Tensor, spec: LayerSpec, axis: int = 0):
        super().__init__()
        self.grid = Grid(spec.weight_bits)
        self.options = LSQOptions(**spec.options)
        dims = [d for d in range(weight.dim()) if d != axis or spec.granularity == "per_tensor"]
        top = largest_level(self.grid.bits)
        mean = weight.detach().float().abs().mean(dims, keepdim=True)
        self.scale = nn.Parameter((2 * mean.nan_to_num() / top**0.5).clamp(min=SMALLEST))
        self.factor = (max(weight.numel() // max(mean.numel(), 1), 1) * top) ** -0.5

    def encode(self, w: Tensor) -> Encoded:
        """Codes of the nearest levels, with the step that decodes them."""
        scale, point = self.scale.detach().float().clamp(min=SMALLEST), self.grid.symmetric_zero_point
        codes = learned_codes(w.detach().float(), scale, point, self.grid.qmax)
        return Encoded(codes, self.grid.bits, scale, torch.full_like(scale, point))

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight, in the dtype of `w`; differentiable in `w` and the step."""
        point = self.grid.symmetric_zero_point
        if (
            self.scale.device.type == "cpu" and not torch.isfinite(self.scale).all()
        ):  # a GPU would have to be waited for
            raise ValueError(f"the step of {said_of(self)} is NaN or infinite; lower the learning rate")
        return learned_quantize(w, kept_positive_(self.scale), point, self.grid.qmax, self.factor)
