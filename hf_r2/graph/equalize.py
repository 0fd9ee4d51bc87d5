"""Cross-layer equalization and high-bias absorption (DFQ, arXiv:1906.04721, sections 4.1 and 4.2), on folded models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_r2.graph.chains import Pair
from hf_r2.graph.fold import statistics_of
from hf_r2.layers import CONVOLUTIONS, TRANSPOSED, is_transformers_conv1d

RELU6 = ("clip", "replace", "skip")
SWEEPS, STILL = 200, 1e-6  # sweeps over all pairs at most; the change of a factor below which nothing moves any more
DEAD = 1e-12  # a channel whose range is below this share of the layer's on either side is left alone


class ClippedReLU(nn.Module):
    """A ReLU6 between equalized layers: clamps each channel to [0, bound], which is 6 over the channel's factor.

    Buffers `bound` [C], and, to take the equalization back, `factor` [C] and `absorbed` [C] (what was subtracted from the
    bias). `dim` is the axis of the channels in the input.
    """

    bound: Tensor
    factor: Tensor
    absorbed: Tensor

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.dim = dim
        self.register_buffer("bound", torch.full((channels,), 6.0))
        self.register_buffer("factor", torch.ones(channels))
        self.register_buffer("absorbed", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`x` clamped, in its shape and dtype."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return torch.minimum(x.clamp(min=0), self.bound.to(x.dtype).view(shape))


@dataclass
class Equalized:
    """What `equalize_` did: pairs scaled, what became of their ReLU6, pairs left alone, biases absorbed."""

    pairs: int = 0
    relu6: dict[str, str] = field(default_factory=dict)  # activation module: "clip" or "replace"
    skipped: list[str] = field(default_factory=list)
    absorbed: int = 0


def equalize_(model: nn.Module, pairs: Iterable[Pair], relu6: str = "clip", absorb: bool = False) -> Equalized:
    """Scales the channels between the layers of each pair so that both sides have the same range, in place.

    s_i = sqrt(r1_i / r2_i) with r the largest magnitude of output channel i of the first layer and of input channel i of
    the second (eq. 11); sweeps over all pairs until nothing moves, which makes the three ranges of a depthwise triple
    equal too. `absorb`: afterwards, moves c = max(0, mean - 3 std) of each channel from the bias of the first layer into
    that of the second (eq. 15), where batch-norm statistics are known and no zeros are padded in between.

    `relu6`: "clip" puts a `ClippedReLU` in its place (the function is kept exactly), "replace" a ReLU (as in the paper:
    values above 6 come through), "skip" leaves such pairs alone. Dead channels (all but zero on a side) keep factor 1.
    """
    done = Equalized()
    chosen = [pair for pair in pairs if _usable(model, pair, relu6, done)]
    for pair in chosen:
        if pair.activation == "relu6":
            _replace_relu6_(model, pair, relu6, done)
    for _ in range(SWEEPS):
        moved = max((_equalize_pair_(model, pair) for pair in chosen), default=0.0)
        if moved < STILL:
            break
    done.pairs = len(chosen)
    if absorb:
        done.absorbed = sum(_absorb_(model, pair) for pair in chosen)
    return done


def _usable(model: nn.Module, pair: Pair, relu6: str, done: Equalized) -> bool:
    if pair.activation != "relu6" or (relu6 != "skip" and pair.activation_module is not None):
        return True
    reason = "relu6='skip'" if relu6 == "skip" else "its ReLU6 is no module of its own"
    done.skipped.append(f"{pair.first} -> {pair.second}: {reason}")
    return False


def _replace_relu6_(model: nn.Module, pair: Pair, relu6: str, done: Equalized) -> None:
    assert pair.activation_module is not None
    first = model.get_submodule(pair.first)
    if relu6 == "replace":
        module: nn.Module = nn.ReLU()
    else:
        weight: Tensor = first.weight  # type: ignore[assignment]
        module = clipped_relu(first).to(device=weight.device)
    model.set_submodule(pair.activation_module, module)
    done.relu6[pair.activation_module] = relu6


def clipped_relu(layer: nn.Module) -> ClippedReLU:
    """A `ClippedReLU` for the output of this convolution or linear layer."""
    convolution = isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    return ClippedReLU(_out_channels(layer), 1 if convolution else -1)


def _out_channels(layer: nn.Module) -> int:
    if is_transformers_conv1d(layer):
        return layer.nf  # type: ignore[return-value]
    return layer.out_channels if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else layer.out_features  # type: ignore[return-value]


def grouped(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as [groups, out / groups, in / groups, elements of a kernel], a view."""
    if is_transformers_conv1d(layer):
        return weight.t()[None, :, :, None]
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED):
        return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _weight(model: nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    module.weight.data = module.weight.data.contiguous()  # type: ignore[union-attr,operator]  # so that `grouped` is a view
    return grouped(module, module.weight.data)  # type: ignore[union-attr,arg-type,operator]


@torch.no_grad()
def _equalize_pair_(model: nn.Module, pair: Pair) -> float:
    """Returns the largest change of a channel, as |log s|."""
    first, second = _weight(model, pair.first), _weight(model, pair.second)
    r1, r2 = first.abs().amax((2, 3)).flatten(), second.abs().amax((1, 3)).flatten()
    alive = (r1 > DEAD * r1.max()) & (r2 > DEAD * r2.max())
    s = torch.where(alive, (r1 / r2).sqrt(), torch.ones_like(r1))
    _scale_(model, pair, s)
    return float(s.log().abs().max())


def _scale_(model: nn.Module, pair: Pair, s: Tensor) -> None:
    """Divides the outputs of the first layer by `s` [C] and multiplies the inputs of the second by it, in place."""
    first, second = _weight(model, pair.first), _weight(model, pair.second)
    first /= s.view(first.shape[0], -1, 1, 1)
    second *= s.view(second.shape[0], 1, -1, 1)
    layer = model.get_submodule(pair.first)
    if layer.bias is not None:
        layer.bias.data /= s  # type: ignore[union-attr,operator]
    norm = statistics_of(layer)
    if norm is not None:
        norm.mean, norm.std, norm.gain = norm.mean / s, norm.std / s, norm.gain / s  # type: ignore[operator]
    clip = _clip(model, pair)
    if clip is not None:
        clip.bound, clip.factor = clip.bound / s, clip.factor * s


def _clip(model: nn.Module, pair: Pair) -> ClippedReLU | None:
    module = model.get_submodule(pair.activation_module) if pair.activation_module else None
    return module if isinstance(module, ClippedReLU) else None


@torch.no_grad()
def _absorb_(model: nn.Module, pair: Pair) -> int:
    """Returns 1 if any channel had something to absorb."""
    norm, clip = statistics_of(model.get_submodule(pair.first)), _clip(model, pair)
    if norm is None or pair.activation is None or pair.padded or model.get_submodule(pair.second).bias is None:
        return 0
    c = (norm.mean - 3 * norm.std).clamp(min=0)  # type: ignore[operator]
    if clip is not None:
        c = torch.where(c < clip.bound, c, torch.zeros_like(c))
        clip.bound, clip.absorbed = clip.bound - c, clip.absorbed + c
    elif pair.activation == "relu6":
        return 0
    if not bool((c > 0).any()):
        return 0
    _shift_(model, pair, c)
    norm.mean = norm.mean - c  # type: ignore[operator]
    return 1


def _shift_(model: nn.Module, pair: Pair, c: Tensor) -> None:
    """Takes `c` [C] from the outputs of the first layer and gives the second what it would have made of it, in place."""
    layer, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    weight = _weight(model, pair.second)
    layer.bias.data -= c  # type: ignore[union-attr,operator]
    gained = (weight.sum(3) * c.view(weight.shape[0], 1, -1)).sum(2).flatten()
    second.bias.data += gained  # type: ignore[union-attr,operator]


@torch.no_grad()
def unclip_(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Takes back the scaling and absorption of pairs with a `ClippedReLU`, in place: their ReLU6 returns."""
    clips = [(pair, clip) for pair in pairs if (clip := _clip(model, pair)) is not None]
    for pair, clip in clips:  # all shifts before any scale: they were made with the scaled weights
        _shift_(model, pair, -clip.absorbed)
    for pair, clip in clips:
        _scale_(model, pair, 1 / clip.factor)
    for pair, _ in clips:
        model.set_submodule(pair.activation_module, nn.ReLU6())  # type: ignore[arg-type]
