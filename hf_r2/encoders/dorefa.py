"""DoReFa weights (Zhou et al. 2016, arXiv:1606.06160): tanh, divided by its largest magnitude, on equal levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, straight_through
from hf_r2.spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class DoReFaOptions:
    """Options of `DoReFa` and of the input quantizers that go with it.

    `rescale`: multiply the levels -1 .. 1 by max |tanh w|, taken as a constant, so that a trained float model keeps its
    function; False: the paper's, which needs a batch norm behind every layer. `clip`: inputs are clipped to [0, clip]
    (the paper's is 1), and to [-clip, clip] where they have both signs.
    """

    rescale: bool = True
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.rescale, bool):
            raise ValueError(f"rescale must be true or false, got {self.rescale!r}")
        check_clip(self.clip)


@dataclass(frozen=True, kw_only=True)
class PACTOptions:
    """Options of PACT (arXiv:1805.06085): DoReFa's weights, inputs with a learned clip.

    `rescale` as in `DoReFaOptions`. `clip`: where the clip starts (the paper's is 10); None: at the largest magnitude of
    the first batch. `clip_decay`: strength of the L2 penalty clip_decay / 2 x clip^2, which `R2Trainer` adds to the loss.
    """

    rescale: bool = True
    clip: float | None = None
    clip_decay: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.rescale, bool):
            raise ValueError(f"rescale must be true or false, got {self.rescale!r}")
        if self.clip is not None:
            check_clip(self.clip)
        if not isinstance(self.clip_decay, (int, float)) or not self.clip_decay >= 0:
            raise ValueError(f"clip_decay must be a number >= 0, got {self.clip_decay!r}")


def check_clip(clip: object) -> None:
    """Raises ValueError unless `clip` is a positive number."""
    if not isinstance(clip, (int, float)) or not 0 < clip < float("inf"):
        raise ValueError(f"clip must be a positive number, got {clip!r}")


class DoReFa(nn.Module):
    """Levels -1, -1 + 2 / (2**b - 1), .. 1 (zero is none of them) of tanh(w) / max|tanh w|, for the tensor as a whole.

    At 1 bit sign(w) times the mean magnitude (zero counts as positive). The gradient passes the rounding as if it were not
    there; tanh and the division keep theirs, also through the maximum. No parameters; codes are stored with a palette of
    their levels. Options: `rescale`.
    """

    def __init__(self, weight: Tensor, spec: LayerSpec, axis: int = 0):
        super().__init__()
        self.bits = spec.weight_bits
        self.rescale = bool(spec.options.get("rescale", True))

    def encode(self, w: Tensor) -> Encoded:
        """Codes of the nearest levels, the levels, and the scale where there is one."""
        value = w.detach().float()
        if self.bits == 1:
            codes, scale = (value >= 0).to(torch.uint8), value.abs().mean()
        else:
            unit, scale = dorefa_unit(value)
            codes = ((unit / 2 + 0.5) * (2**self.bits - 1)).round().to(torch.uint8)
        kept = scale.reshape([1] * w.dim()) if self.rescale or self.bits == 1 else None
        return Encoded(codes, self.bits, kept, centroids=dorefa_levels(self.bits)[:, None].to(w.device))

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight, in the dtype of `w`."""
        with torch.no_grad():
            value = self.encode(w).decode()
        if self.bits == 1:
            return straight_through(w, value)
        unit, scale = dorefa_unit(w.float())
        return straight_through((unit * scale if self.rescale else unit), value).to(w.dtype)


def dorefa_levels(bits: int) -> Tensor:
    """The 2**bits levels from -1 to 1, float32, ascending."""
    return torch.linspace(-1, 1, 2**bits)


def dorefa_unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(w) / max|tanh w|, and that maximum without its gradient; zero weights stay zero."""
    t = torch.tanh(w)
    top = t.abs().amax() if w.numel() else t.sum()
    top = torch.where(top > 0, top, torch.ones_like(top))
    return t / top, top.detach()
