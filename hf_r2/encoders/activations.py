"""Quantization of the inputs of a layer: static ranges from calibration, or the range of each batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.grid import Grid, fake_quantize, observed_range, quantize, scale_and_zero_point
from hf_r2.ranges import mse_range, percentile_range

SAMPLES, BATCHES = 1 << 14, 64  # values kept of each batch, batches that values are kept of


class InputQuantizer(nn.Module):
    """Fake-quantizes a layer's input per tensor on an asymmetric grid that holds zero (unsigned after a ReLU).

    Static: buffers `scale` and `zero_point` (float32, no dimensions), set by `set_range_` or from what was observed;
    dynamic: none, the range is that of the tensor itself. Integer inputs (token ids) pass untouched.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, bits: int, act_range: str = "static"):
        super().__init__()
        self.grid = Grid(bits, symmetric=False)
        self.dynamic = act_range == "dynamic"
        self.ready = True  # False: passes its input on until there is a range
        self.observing = False
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._samples: list[Tensor] = []
        self.register_buffer("scale", None if self.dynamic else torch.ones(()))
        self.register_buffer("zero_point", None if self.dynamic else torch.zeros(()))

    def observe(self, x: Tensor) -> None:
        """Widens the observed range by that of `x`, and keeps up to `SAMPLES` of its values, drawn at random."""
        x = x.detach().float().flatten()
        low, high = x.aminmax()
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if len(self._samples) < BATCHES:
            if len(x) > SAMPLES:
                generator = torch.Generator().manual_seed(len(self._samples))
                x = x[torch.randint(len(x), (SAMPLES,), generator=generator).to(x.device)]
            self._samples.append(x)

    def is_finite(self) -> bool:
        """False where NaN or infinity was observed."""
        return self._low is None or self._high is None or bool(torch.isfinite(self._high - self._low))

    def set_range_(self, low: Tensor, high: Tensor) -> None:
        """Puts the grid over [low, high], tensors without dimensions."""
        self.scale, self.zero_point = scale_and_zero_point(low, high, self.grid)
        self.ready = True

    def finish(self, rule: str = "minmax") -> bool:
        """Sets the range from what was observed; False where no input was seen (the range stays unset).

        "minmax": lowest and highest value; "mse" and "percentile": `hf_r2.ranges` on the values that were kept.
        """
        self.observing = False
        if self._low is None or self._high is None:
            return False
        low, high = self._low, self._high
        if rule != "minmax":
            search = mse_range if rule == "mse" else percentile_range
            low, high = (end.view(()) for end in search(torch.cat(self._samples), self.grid, None))
        self.set_range_(low, high)
        self._low = self._high = None
        self._samples = []
        return True

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its shape and dtype; while observing, `x` itself."""
        if not x.is_floating_point() or x.numel() == 0:
            return x
        if self.observing:
            self.observe(x)
        if self.observing or not self.ready:
            return x
        return fake_quantize(x.float(), *self._grid_of(x), self.grid).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of `x` (uint8, in its shape), scale and zero point (no dimensions): what `forward` rounds to."""
        scale, zero_point = self._grid_of(x)
        return quantize(x.float(), scale, zero_point, self.grid), scale.view(()), zero_point.view(())

    def _grid_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.scale, self.zero_point
        if self.dynamic:
            low, high = observed_range(x.detach().float(), self.grid, None)
            scale, zero_point = scale_and_zero_point(low, high, self.grid)
        assert scale is not None and zero_point is not None  # static ones hold buffers
        return scale.float(), zero_point.float()
