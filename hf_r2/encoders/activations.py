"""Quantization of the inputs of a layer: static ranges from calibration, or the range of each batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.grid import Grid, fake_quantize, observed_range, scale_and_zero_point


class InputQuantizer(nn.Module):
    """Fake-quantizes a layer's input per tensor on an asymmetric grid that holds zero (unsigned after a ReLU).

    Static: buffers `scale` and `zero_point` (float32, no dimensions), set by `calibrated`; dynamic: none, the range is
    that of the tensor itself. Integer inputs (token ids) pass untouched.
    """

    def __init__(self, bits: int, act_range: str = "static"):
        super().__init__()
        self.grid = Grid(bits, symmetric=False)
        self.dynamic = act_range == "dynamic"
        self.observing = False
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self.register_buffer("scale", None if self.dynamic else torch.ones(()))
        self.register_buffer("zero_point", None if self.dynamic else torch.zeros(()))

    def observe(self, x: Tensor) -> None:
        """Widens the observed range by that of `x`."""
        low, high = x.detach().float().aminmax()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def finish(self) -> bool:
        """Sets scale and zero point from what was observed; False where no input was seen (the range stays unset)."""
        self.observing = False
        if self._low is None or self._high is None:
            return False
        self.scale, self.zero_point = scale_and_zero_point(self._low, self._high, self.grid)
        self._low = self._high = None
        return True

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its shape and dtype; while observing, `x` itself."""
        if not x.is_floating_point() or x.numel() == 0:
            return x
        if self.observing:
            self.observe(x)
            return x
        scale, zero_point = self.scale, self.zero_point
        if self.dynamic:
            low, high = observed_range(x.detach().float(), self.grid, None)
            scale, zero_point = scale_and_zero_point(low, high, self.grid)
        assert scale is not None and zero_point is not None  # static ones hold buffers
        return fake_quantize(x.float(), scale.float(), zero_point.float(), self.grid).to(x.dtype)
