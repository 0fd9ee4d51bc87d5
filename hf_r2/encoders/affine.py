"""Rounding to a fixed uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, straight_through
from hf_r2.grid import observed_range, quantize, scale_and_zero_point
from hf_r2.spec import LayerSpec


class Affine(nn.Module):
    """Nearest level of a grid over the weight's range (set once, from the weight given); the identity's gradient.

    Buffers `scale` and `zero_point`, float32, broadcastable to the weight: one pair, or one per index of `axis`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, spec: LayerSpec, axis: int = 0):
        super().__init__()
        self.grid = spec.grid
        self.axis = axis if spec.granularity == "per_channel" else None
        scale, zero_point = scale_and_zero_point(
            *observed_range(weight.detach().float(), self.grid, self.axis), self.grid
        )
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def encode(self, w: Tensor) -> Encoded:
        """Codes of `w` on the grid, with the scale and zero point that decode them."""
        codes = quantize(w.detach().float(), self.scale, self.zero_point, self.grid)
        return Encoded(codes, self.grid.bits, self.scale, self.zero_point, self.grid.symmetric)

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight, in the dtype of `w`."""
        with torch.no_grad():
            value = self.encode(w).decode()
        return straight_through(w, value)
