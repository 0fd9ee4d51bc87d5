"""Rounding to a fixed uniform grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, straight_through
from hf_r2.grid import observed_range, quantize, scale_and_zero_point
from hf_r2.spec import LayerSpec


class Affine(nn.Module):
    """Levels of a grid over the weight's range: the nearest, or those pinned by `set_codes_`; the identity's gradient.

    Buffers `scale` and `zero_point`, float32, broadcastable to the weight: one pair, or one per index of `axis`; at the
    start those of the weight's own minimum and maximum. `codes` (uint8, the weight's shape) is None until pinned, and
    not stored: it is there between a post-training method and packing.
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor | None

    def __init__(self, weight: Tensor, spec: LayerSpec, axis: int = 0):
        super().__init__()
        self.grid = spec.grid
        self.axis = axis if spec.granularity == "per_channel" else None
        scale, zero_point = scale_and_zero_point(
            *observed_range(weight.detach().float(), self.grid, self.axis), self.grid
        )
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("codes", None, persistent=False)

    def set_range_(self, low: Tensor, high: Tensor) -> None:
        """Puts the grid over [low, high], shapes as `scale`; pinned codes are dropped."""
        self.scale, self.zero_point = scale_and_zero_point(low, high, self.grid)
        self.codes = None

    def set_codes_(self, codes: Tensor) -> None:
        """Pins the code of each weight, uint8 in the weight's shape, within the grid's qmin and qmax."""
        self.codes = codes

    def encode(self, w: Tensor) -> Encoded:
        """Codes of `w` (nearest on the grid, or the pinned ones), with the scale and zero point that decode them."""
        codes = self.codes
        if codes is None:
            codes = quantize(w.detach().float(), self.scale, self.zero_point, self.grid)
        return Encoded(codes, self.grid.bits, self.scale, self.zero_point, self.grid.symmetric)

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight, in the dtype of `w`."""
        with torch.no_grad():
            value = self.encode(w).decode()
        return straight_through(w, value)
