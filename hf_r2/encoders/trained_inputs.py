"""Input quantizers whose range is trained: LSQ and LSQ+ (a step, an offset), PACT (a clip), DoReFa (a fixed clip)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hf_r2.encoders.activations import InputQuantizer
from hf_r2.encoders.dorefa import DoReFaOptions, PACTOptions
from hf_r2.encoders.learned import SMALLEST, kept_positive_, learned_quantize
from hf_r2.encoders.lsq import LSQOptions, largest_level
from hf_r2.grid import Grid, fake_quantize
from hf_r2.spec import LayerSpec

UNKNOWN, ONE_SIDED, TWO_SIDED = 0, 1, 2
SAMPLES = 1 << 14  # values that a step is searched on


class TrainedInput(nn.Module):
    """Fake-quantizes a layer's input per tensor; the range starts from the first batch met in training mode.

    Buffer `state` (uint8): 0 before that batch, then 1 where inputs had one sign (codes from 0 up) or 2 (zero point in
    the middle). Before it, in eval mode, the input passes. Under data parallelism every process starts from all their
    first batches together. Integer inputs (token ids) pass untouched. Computed in float32.
    """

    state: Tensor
    dynamic = False

    def __init__(self, bits: int):
        super().__init__()
        self.grid = Grid(bits, symmetric=False)
        self.register_buffer("state", torch.tensor(UNKNOWN, dtype=torch.uint8))
        self._known = UNKNOWN  # a copy of `state`: a GPU need not be asked for it at every step

    @property
    def known(self) -> int:
        """`state` as a number."""
        if self._known == UNKNOWN:
            self._known = int(self.state)
        return self._known

    @property
    def middle(self) -> float:
        """The zero point without an offset: 0, or 2**(bits - 1) where inputs have both signs."""
        return 2.0 ** (self.grid.bits - 1) if self.known == TWO_SIDED else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its shape and dtype."""
        if not x.is_floating_point() or x.numel() == 0:
            return x
        if self.known == UNKNOWN:
            if not self.training:
                return x
            with torch.no_grad():
                values = everywhere(x.detach().float().flatten())
                self.state.fill_(TWO_SIDED if bool((values < 0).any()) else ONE_SIDED)
                self.begin_(values)
        if torch.is_grad_enabled():
            return self.learned(x)
        scale, zero_point = self.levels()
        return fake_quantize(x.float(), scale, zero_point, self.grid).to(x.dtype)

    @torch.no_grad()
    def settled(self) -> InputQuantizer:
        """A plain input quantizer that computes the same.

        Raises ValueError where no range is known yet.
        """
        if self.known == UNKNOWN:
            raise ValueError("the range of its input is not known: no batch has passed in training mode")
        plain = InputQuantizer(self.grid.bits)
        plain.scale, plain.zero_point = (end.detach().clone() for end in self.levels())
        return plain

    def begin_(self, values: Tensor) -> None:
        """Sets where the learned range starts, from all values of the first batch."""
        raise NotImplementedError

    def levels(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32, without dimensions."""
        raise NotImplementedError

    def learned(self, x: Tensor) -> Tensor:
        """`x` on the grid, differentiable in what is learned."""
        raise NotImplementedError


class LearnedStepInput(TrainedInput):
    """LSQ: parameter `scale`; LSQ+: parameter `offset` too, the lowest level (`LSQOptions`).

    Starts: 2 mean|x| / sqrt(Q_p) (LSQ, section 2.1); with an offset the lowest value, and the step of least squared
    error above it (LSQ+, section 3.2).
    Gradients are divided by sqrt(features x Q_p), features those of one sample.
    """

    def __init__(self, spec: LayerSpec):
        assert spec.act_bits is not None
        super().__init__(spec.act_bits)
        self.scale = nn.Parameter(torch.ones(()))
        shifted = spec.method == "lsq" and LSQOptions(**spec.options).offset
        self.offset = nn.Parameter(torch.zeros(())) if shifted else None

    @property
    def largest(self) -> int:
        """Q_p, in steps."""
        return largest_level(self.grid.bits, self.known == TWO_SIDED and self.offset is None)

    def begin_(self, values: Tensor) -> None:
        """See the class."""
        step = 2 * values.abs().mean() / self.largest**0.5
        if self.offset is not None:
            step = best_step(values, self.grid.qmax)
            self.offset.copy_(values.min())
        self.scale.copy_(step.clamp(min=SMALLEST))

    def levels(self) -> tuple[Tensor, Tensor]:
        """See the base class."""
        scale = self.scale.float().clamp(min=SMALLEST)
        return scale, torch.full_like(scale, self.middle) if self.offset is None else -self.offset.float() / scale

    def learned(self, x: Tensor) -> Tensor:
        """See the base class."""
        scale = kept_positive_(self.scale)
        factor = (max(x[0].numel(), 1) * self.largest) ** -0.5
        if self.offset is None:
            return learned_quantize(x, scale, self.middle, self.grid.qmax, factor)
        shift: Tensor = _ScaledGradient.apply(self.offset.float(), factor)  # type: ignore[assignment]
        return (learned_quantize(x.float() - shift, scale, 0.0, self.grid.qmax, factor) + shift).to(x.dtype)


class ClippedInput(TrainedInput):
    """PACT: parameter `clip`, clip_decay / 2 x clip^2 as `penalty`; for DoReFa the clip is a constant.

    One-sided inputs are clipped to [0, clip]. Two-sided ones (not in the papers) to [-clip, clip (1 - 2**(1 - bits))], so
    that zero is a level.
    """

    clip: Tensor

    def __init__(self, spec: LayerSpec):
        assert spec.act_bits is not None
        super().__init__(spec.act_bits)
        options = DoReFaOptions(**spec.options) if spec.method == "dorefa" else PACTOptions(**spec.options)
        self.start = options.clip
        clip = torch.tensor(1.0 if self.start is None else float(self.start))
        if isinstance(options, PACTOptions):
            self.clip_decay, self.clip = float(options.clip_decay), nn.Parameter(clip)
        else:
            self.register_buffer("clip", clip)

    def begin_(self, values: Tensor) -> None:
        """See the class."""
        if self.start is None:
            self.clip.copy_(values.abs().max().clamp(min=SMALLEST))

    def levels(self) -> tuple[Tensor, Tensor]:
        """See the base class."""
        scale = self.clip.float().clamp(min=SMALLEST) / (self.middle or self.grid.qmax)
        return scale, torch.full_like(scale, self.middle)

    def learned(self, x: Tensor) -> Tensor:
        """See the base class."""
        return pact(x, kept_positive_(self.clip), self.middle, self.grid)

    def penalty(self) -> Tensor | None:
        """What `R2Trainer` adds to the loss; None where nothing is learned."""
        return self.clip.square() * (self.clip_decay / 2) if isinstance(self.clip, nn.Parameter) else None


def pact(x: Tensor, clip: Tensor, zero_point: float, grid: Grid) -> Tensor:
    """`x` clipped and rounded (PACT, eq. 1 and 2), `clip` > 0 without dimensions; zero point 0 or 2**(bits - 1).

    Gradients: for `x` 1 inside the range and 0 outside, for `clip` (PACT, eq. 3) the end's own slope outside: 1 above it.
    """
    return _Clipped.apply(x, clip, zero_point, grid)  # type: ignore[return-value]


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, clip: Tensor, zero_point: float, grid: Grid) -> Tensor:
        scale = clip / (zero_point or grid.qmax)
        ctx.save_for_backward(x, clip)
        ctx.low, ctx.high = -zero_point * scale, (grid.qmax - zero_point) * scale
        return fake_quantize(x.to(clip.dtype), scale, torch.full_like(scale, zero_point), grid).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, clip = ctx.saved_tensors
        above, below = x >= ctx.high, x < ctx.low
        wide = grad.to(clip.dtype)
        slope = ((wide * above).sum() * ctx.high + (wide * below).sum() * ctx.low) / clip
        return grad * ~(above | below), slope, None, None


def best_step(values: Tensor, qmax: int) -> Tensor:
    """The step of least squared error for `values` on levels lowest + code x step, codes 0..qmax; no dimensions."""
    some = values[:: max(1, len(values) // SAMPLES)]
    some, widest = some - values.min(), values.max() - values.min()
    steps = widest * torch.linspace(0.05, 1, 96, device=values.device) / qmax
    errors = [
        ((some / step.clamp(min=SMALLEST)).round().clamp(max=qmax) * step - some).square().sum() for step in steps
    ]
    return steps[torch.stack(errors).argmin()]


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def everywhere(values: Tensor) -> Tensor:
    """The values of all processes of a distributed run, one after the other; outside of one `values` itself."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    gathered: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values.cpu())
    return torch.cat([part for part in gathered if part is not None]).to(values.device)
