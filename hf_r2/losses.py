"""Range losses: what pulls outlier weights in while a model is trained (R2, arXiv:2303.08253; DSMM, eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_r2.layers import WeightLayer, folded_weight, following_batch_norms, weight_layers
from hf_r2.range_compiled import compiler_found
from hf_r2.range_kernel import Way, center_and_spread, excesses, extremes, magnitudes, soft_ranges
from hf_r2.range_shards import whole
from hf_r2.vectors import to_vectors

LOWEST_ALPHA = 1e-3  # a trainable alpha is projected back to this: a negative one would reward a wider range
UNITS = ("absolute", "std", "relative")
TARGETS = ("raw", "deployed")


def _wide(w: Tensor) -> Tensor:
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def l_inf(w: Tensor) -> Tensor:
    """Largest magnitude in `w` (any shape), scalar, in the units of `w` (R2, L-inf form; ALGORITHMS 1.2).

    Its gradient is the sign of that one weight (equal ones share it, as in `torch.amax`). Empty weights give 0.
    """
    return magnitudes([w])[0]


def margin(w: Tensor, m: Tensor | float) -> Tensor:
    """|m| + sum of what sticks out of [-|m|, |m|], scalar, in the units of `w` (R2, margin form; ALGORITHMS 1.3).

    dL/dw = sign(w) where |w| > |m|, dL/d|m| = 1 - the number of those. `w` any shape, `m` a scalar (its sign does not
    matter). Minimised over m it is `l_inf(w)`.
    """
    return excesses([w], _size(torch.as_tensor(m, dtype=_wide(w).dtype, device=w.device)).view(1))[0]


def _size(m: Tensor) -> Tensor:
    """|m|, with slope 1 at 0, where that of `torch.abs` is 0 and would hold a margin there for ever."""
    return torch.where(m < 0, -m, m)


def soft_min_max(w: Tensor, alpha: Tensor | float, dim: int = 1) -> Tensor:
    """Smooth width of the range of `w`, scalar, in the units of `w` (DSMM, S1 eq. 1).

    s_max = sum(w softmax(alpha w)), s_min = sum(w softmax(-alpha w)), loss = s_max - s_min + exp(-alpha)

    dL/dw = p (1 + alpha (w - s_max)) - q (1 - alpha (w - s_min)) with p and q the two softmaxes;
    dL/dalpha = Var_p(w) + Var_q(w) - exp(-alpha). `w` has any shape; `alpha` > 0 is a scalar in 1 / units of `w`: the
    larger, the closer to max - min. `dim=d` takes `w` as vectors of length d along the output channels (the last
    `numel mod d` weights left out, as vector clustering does) and sums the widths of their d coordinates. NaN or Inf in
    `w` gives NaN.

    Raises ValueError for an alpha that is not positive (it would reward a wider range; a tensor elsewhere than on a CPU
    is not looked at, as that would wait for the device), or dim < 1.
    """
    known = alpha.item() if isinstance(alpha, Tensor) and alpha.device.type == "cpu" else alpha
    if not isinstance(known, Tensor) and not 0 < known < math.inf:
        raise ValueError(f"alpha must be a positive number, got {known}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    a = torch.as_tensor(alpha, dtype=_wide(w).dtype, device=w.device)
    parts = coordinates(w, dim)
    return soft_ranges(parts, a.expand(len(parts))).to(a.dtype).sum() + torch.exp(-a)


def coordinates(w: Tensor, dim: int) -> list[Tensor]:
    """The `dim` coordinates of `w` seen as vectors along its first axis, each [numel // dim]; [w] for dim 1."""
    return [w] if dim == 1 else list(to_vectors(w, dim)[0].unbind(1))


@dataclass(frozen=True)
class RangeLossRow:
    """One kind of range loss: the function of a tensor, its source, and the name of its learnable scalar (if any)."""

    function: Any
    paper: str
    scalar: str | None


RANGE_LOSSES: dict[str, RangeLossRow] = {
    "l_inf": RangeLossRow(l_inf, "arXiv:2303.08253", None),
    "margin": RangeLossRow(margin, "arXiv:2303.08253", "margin"),
    "soft_min_max": RangeLossRow(soft_min_max, "arXiv:2303.08253, eq. 1 of the DSMM paper", "alpha"),
}


def learns(kind: str, trainable: bool | None, units: str) -> bool:
    """Whether the scalar of this loss learns: as asked for, or by default in absolute units, and a margin in all."""
    scalar = RANGE_LOSSES[kind].scalar
    return scalar is not None and (units == "absolute" or scalar == "margin" if trainable is None else trainable)


def size_aware_alpha(numel: int) -> float:
    """sqrt(2 ln N): the temperature, per standard deviation, at which N Gaussian weights condense on their extremes.

    The exponentials of a standard Gaussian bulk sum to N exp(alpha^2 / 2) on average. A weight x standard deviations out
    therefore has the share p = 1 / (1 + N exp(alpha^2 / 2 - alpha x)) of the softmax, and as s_max <= x where it is the
    largest, its pull p (1 + alpha (x - s_max)) is at least p. With alpha = 0.1 that is about exp(x / 10) / N: it vanishes
    with N. With alpha_N = sqrt(2 ln N), which is also where the largest of N Gaussian weights lies, an outlier at
    x = c alpha_N has p = 1 / (1 + N^(2 - 2c)): more than 1/2 for every c > 1, whatever N.

    No pull is larger than 1.25 + ln(N) / 4, for any alpha and any weights: with p = exp(t - H), t = alpha (x - s_max) and
    H the entropy, t <= (1 - p) ln((N - 1) p / (1 - p)), so -exp(-2) <= p (1 + t) <= 1.1 + ln(N) / 4.
    """
    return max(1.0, math.sqrt(2 * math.log(max(numel, 2))))


class RangeLoss(nn.Module):
    """The range loss of all weights of a model, and the learnable scalars (alpha or margin, one per weight) that go with it.

    Args:
        model: its linear, convolution and embedding weights are restricted (tied ones once, frozen ones not). May be
            wrapped by torch.compile, DataParallel or DDP.
        kind: "soft_min_max", "margin" or "l_inf".
        alpha: start of alpha. Default 0.1 as in the paper; in units of std `size_aware_alpha` of each weight.
        trainable: whether alpha (margin) learns. Default: yes in absolute units, alpha not in the others.
        units: "absolute", the paper's form, or "std": the weight over its own, detached, standard deviation. In std
            units the pull on a weight x standard deviations out is
            dL/dw = [p (1 + alpha (x - s_max)) - q (1 - alpha (x - s_min))] / std,
            which does not vanish with the number of weights (for alpha near sqrt(2 ln N), see `size_aware_alpha`) nor
            with their scale, while the paper's form at alpha std << 1 gives 4 alpha (w - mean) / N.
            "relative": as "std", but the gradient of the weight is multiplied by its (raw, detached) variance, so that a
            step of plain gradient descent moves every weight by the same share of its std, whatever its scale: in "std"
            a weight with a std of 0.01 is moved 10,000 times as far, in its own std, as one with a std of 1. What else
            the deployed weight depends on (the batch norm's gamma) is moved as in "std". Values are those of "std".
        target: "raw", the parameter, or "deployed": with the batch norm behind it folded in (differentiably).
        dim: the weight as vectors of this length (see `soft_min_max`).
        skip: globs of layer names to leave out.
        compiled: whether to use compiled loops for large float32 weights on a CPU, where there is a compiler: about twice as
            fast, after up to a minute of compiling at the first call (torch caches the result).

    The model's parameters are not registered here: `parameters()` gives the scalars alone, one tensor `scalars` [weights].

    NaN or Inf in a weight makes the loss NaN or Inf. It is computed in one pass over all weights (`hf_r2.range_kernel`).

    Raises ValueError for arguments that are not allowed and for a model without any weight to restrict.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "soft_min_max",
        alpha: float | None = None,
        trainable: bool | None = None,
        units: str = "absolute",
        target: str = "raw",
        dim: int = 1,
        skip: Sequence[str] = (),
        compiled: bool = False,
    ):
        super().__init__()
        _check(kind, alpha, trainable, units, target, dim)
        model = _unwrapped(model)
        layers = [layer for layer in weight_layers(model, skip) if layer.weight.requires_grad]
        if not layers:
            raise ValueError("the range loss found no trainable linear, convolution or embedding weight in the model")
        norms = following_batch_norms(model) if target == "deployed" else {}
        # plain attributes behind a tuple: a Module or Parameter set directly would become part of this module's state
        self._model_refs = (layers, [norms.get(layer.name) for layer in layers])
        self.kind, self.units, self.target, self.dim = kind, units, target, dim
        self.use_compiler(compiled)
        self.trainable = learns(kind, trainable, units)
        start = [self._start(layer, norm, alpha) for layer, norm in zip(*self._model_refs, strict=True)]
        device = layers[0].weight.device
        self.scalars = nn.Parameter(torch.tensor(start, device=device), requires_grad=self.trainable)

    def _start(self, layer: WeightLayer, norm: nn.Module | None, alpha: float | None) -> float:
        if self.kind == "margin":
            weight = self._target(layer, norm).detach()
            return float(weight.abs().max()) if weight.numel() else 0.0
        if alpha is not None:
            return alpha
        return 0.1 if self.units == "absolute" else size_aware_alpha(layer.weight.numel() // self.dim)

    @property
    def names(self) -> list[str]:
        """Names of the restricted layers, in the order of `scalars`."""
        return [layer.name for layer in self._model_refs[0]]

    def weights(self) -> dict[str, nn.Parameter]:
        """{layer name: its float parameter}."""
        return {layer.name: layer.weight for layer in self._model_refs[0]}

    def _target(self, layer: WeightLayer, norm: nn.Module | None) -> Tensor:
        """The weight that is measured, raw or folded, in absolute units."""
        weight: Tensor = layer.weight
        if self.units == "relative" and torch.is_grad_enabled():
            weight = _Preconditioned.apply(weight, _std(weight).square())  # type: ignore[assignment]
        return weight if norm is None else folded_weight(weight, norm)

    def use_compiler(self, compiled: bool) -> None:
        """Switches the compiled loops on, where there is a compiler, or off."""
        self.compiled = compiled and compiler_found()

    def forward(
        self,
        only: Collection[str] | None = None,
        *,
        into_grad: bool = False,
        weights: dict[str, nn.Parameter] | None = None,
    ) -> Tensor:
        """Sum of the range losses of all weights (of the layers named in `only`, if given), scalar; 0 for none.

        Of weights that are DTensors, as FSDP2 makes them, the loss is that of the whole weights; all processes must come
        here. FSDP2 puts others in their place during a forward pass: pass `weights()` of before.

        With `into_grad`, `backward()` adds the gradient of the weights to their `.grad` at its very end, without memory for
        a second one. Not for weights whose gradients somebody waits for meanwhile, as DDP, FSDP and DeepSpeed do; weights
        with hooks of their own, and `torch.autograd.grad`, are recognized and served as ever.
        """
        layers, norms = self._model_refs
        chosen = [i for i, layer in enumerate(layers) if only is None or layer.name in only]
        if not chosen:
            return self.scalars.sum() * 0
        if self.trainable:
            self.project_()
        measured = [self._target(layers[i], norms[i]) if weights is None else weights[layers[i].name] for i in chosen]
        scalars = self.scalars if len(chosen) == len(layers) else self.scalars[chosen]
        # L(w / std; alpha) = L(w; alpha / std) / std: the weight need not be copied to be measured in its own std.
        std = torch.stack([_std(w).to(scalars.device) for w in measured]) if self.units != "absolute" else None
        way = Way(self.compiled, into_grad)
        if self.kind == "l_inf":
            losses = magnitudes(measured, way)
        elif self.kind == "margin":
            losses = excesses(measured, _size(scalars if std is None else scalars * std), way)
        else:
            alphas = scalars if std is None else scalars / std
            parts = [part for w in measured for part in coordinates(w, self.dim)]
            losses = soft_ranges(parts, alphas.repeat_interleave(self.dim), way).view(-1, self.dim).sum(1)
        losses = losses if std is None else losses / std
        return losses.sum() + (torch.exp(-scalars).sum() if self.kind == "soft_min_max" else 0)

    @torch.no_grad()
    def project_(self) -> None:
        """Puts scalars that an optimizer step made negative back to their bound, as every forward pass does first."""
        self.scalars.clamp_(min=0.0 if self.kind == "margin" else LOWEST_ALPHA)

    @torch.no_grad()
    def mean_range_over_std(self) -> Tensor:
        """Mean over the weights of (max - min) / std, scalar; weights with std 0 are left out."""
        ratios = []
        for layer, norm in zip(*self._model_refs, strict=True):
            w = self._target(layer, norm)
            if w.numel() > 1:
                low, high = extremes(w)
                ratios.append((high - low) / center_and_spread(w)[1])
        ratios = torch.stack(ratios) if ratios else torch.zeros(1)
        return ratios[torch.isfinite(ratios)].mean()

    @torch.no_grad()
    def summary(self) -> list[dict[str, Any]]:
        """One dict per weight: name, numel, range, std (units of the weight), range_over_std, kurtosis (3 for a
        Gaussian), and alpha or margin. Of the folded weight where the target is the deployed one."""
        rows = []
        for layer, norm, scalar in zip(*self._model_refs, self.scalars.tolist(), strict=True):
            w = whole(self._target(layer, norm)).double()
            std = float(w.std(correction=0)) if w.numel() else 0.0
            width = float(w.max() - w.min()) if w.numel() else 0.0
            fourth = float(((w - w.mean()) ** 4).mean()) if w.numel() else 0.0
            row: dict[str, Any] = {"name": layer.name, "numel": w.numel(), "range": width, "std": std}
            row |= {"range_over_std": width / std if std else 0.0, "kurtosis": fourth / std**4 if std else 0.0}
            learned = RANGE_LOSSES[self.kind].scalar
            if learned is not None:
                row[learned] = scalar
            rows.append(row)
        return rows


class _Preconditioned(torch.autograd.Function):
    """The weight itself; its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(gain)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gain,) = ctx.saved_tensors
        return (grads[0] * gain).to(grads[0].dtype), None


def _std(w: Tensor) -> Tensor:
    """Standard deviation of `w`, detached, scalar; 1 for a constant weight, whose deviation is nothing but rounding."""
    mean, std = center_and_spread(w)
    return torch.where(std <= 1e-6 * mean.abs(), torch.ones_like(std), std)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, with its own layer names, out of torch.compile, DataParallel and DDP."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _check(kind: str, alpha: float | None, trainable: bool | None, units: str, target: str, dim: int) -> None:
    if kind not in RANGE_LOSSES:
        raise ValueError(f"no range loss called {kind!r}; there are: {', '.join(RANGE_LOSSES)}")
    if units not in UNITS:
        raise ValueError(f"units must be one of {', '.join(UNITS)}; got {units!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be an integer of at least 1, got {dim!r}")
    if dim > 1 and kind != "soft_min_max":
        raise ValueError(f"dim is for soft_min_max; {kind!r} takes 1, got {dim}")
    if alpha is not None and kind != "soft_min_max":
        raise ValueError(f"alpha is for soft_min_max, not for {kind!r}; got {alpha}")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    if units != "absolute" and kind == "soft_min_max" and trainable:
        raise ValueError(
            f"units={units!r} needs a fixed alpha (trainable=False): measured in its own std a weight has Var_p + Var_q > "
            "exp(-alpha), so a trainable alpha falls to its lower bound at once"
        )
