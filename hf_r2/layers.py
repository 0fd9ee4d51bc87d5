"""What counts as a weight: one definition for the range loss, for quantization and for statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DEAD = 1e-6  # the share of eps below which the variance of a channel is that of one that never changes


@dataclass(frozen=True)
class WeightLayer:
    """A layer that holds a weight: its dotted name in the model, and the module."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The float parameter itself, also where an encoder stands in front of it."""
        weight = self.module._parameters["weight"]
        if weight is None:
            raise ValueError(f"layer {self.name!r} has no float weight any more: it is packed already")
        return weight

    @property
    def channel_axis(self) -> int:
        """The axis of output channels (rows of an embedding): what `per_channel` means for this layer."""
        return channel_axis(self.module)


def is_transformers_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D`, a linear layer with a transposed weight [in, out]; told by name, so that this file needs torch only."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_table(module: nn.Module) -> bool:
    """True for an embedding that is trained and looked up by index; fixed (sinusoidal) position tables are not weights.

    Subclasses that redefine `forward` with another first argument than indices (sinusoidal and learned positions of the
    BART family) are left alone: their tables are tiny, and some are not even stored in a checkpoint.
    """
    return isinstance(module, nn.Embedding) and "Positional" not in type(module).__name__


def is_weight_layer(module: nn.Module) -> bool:
    """True for linear, (transposed) convolution, transformers' `Conv1D` and embedding layers of any architecture."""
    known = isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) or is_table(module)
    return known or is_transformers_conv1d(module)


def channel_axis(module: nn.Module) -> int:
    """Axis of the output channels in `module.weight`: 1 for transposed convolutions and transformers' `Conv1D`, else 0."""
    return 1 if isinstance(module, TRANSPOSED) or is_transformers_conv1d(module) else 0


def weight_layers(model: nn.Module, skip: Iterable[str] = (), *, tied: bool = False) -> list[WeightLayer]:
    """The layers of `model` that hold a float weight, in the order of registration.

    `skip` holds globs of layer names to leave out. A weight that several layers share (tied tables) is listed once,
    under the first name, unless `tied` asks for all of them; a glob that matches any of its names leaves out all.
    Layers that are packed already are not listed.

    Raises ValueError for a glob that matches no weight layer.
    """
    layers = [WeightLayer(name, m) for name, m in model.named_modules(remove_duplicate=True) if _holds_weight(m)]
    check_globs(skip, [layer.name for layer in layers], "skip")
    skipped = {id(layer.weight) for layer in layers if matches(layer.name, skip)}
    layers = [layer for layer in layers if id(layer.weight) not in skipped]
    return layers if tied else list(_first_of_each(layers))


def _holds_weight(module: nn.Module) -> bool:
    return is_weight_layer(module) and isinstance(module._parameters.get("weight"), nn.Parameter)


def _first_of_each(layers: Iterable[WeightLayer]) -> Iterator[WeightLayer]:
    seen: set[int] = set()
    for layer in layers:
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            yield layer


def matches(name: str, globs: Iterable[str]) -> bool:
    """True if any of `globs` matches the whole layer name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def check_globs(globs: Iterable[str], names: list[str], where: str) -> None:
    """Raises ValueError for a glob that matches none of `names`: a misspelt rule must not pass in silence."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{where}: {glob!r} matches no layer; the weight layers are: {known or 'none'}")


def first_and_last(model: nn.Module) -> tuple[str, str]:
    """Names of the first and the last layer, in the order of registration; tables come before them and are no input layers."""
    names = [layer.name for layer in weight_layers(model, tied=True)]
    names = [name for name in names if not is_table(model.get_submodule(name))] or names
    return names[0], names[-1]


def following_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norm behind each convolution, by the name of the convolution.

    Read off the order of registration: the batch norm that is the next weight or norm registered after the convolution
    in the same parent, with as many channels. That is how transformers (`convolution`, `normalization`), timm and
    torchvision write their blocks; it is a reading of the module tree, not of the computation.
    """
    pairs: dict[str, nn.Module] = {}
    for parent_name, parent in model.named_modules():
        conv_name, conv = None, None
        for child_name, child in parent.named_children():
            if isinstance(child, CONVOLUTIONS):
                conv_name, conv = f"{parent_name}.{child_name}".lstrip("."), child
            elif isinstance(child, BATCH_NORMS):
                if conv_name and conv is not None and child.num_features == conv.out_channels:
                    pairs[conv_name] = child
                conv_name, conv = None, None
            elif is_weight_layer(child):
                conv_name, conv = None, None
    return pairs


def dead_channels(batch_norm: nn.Module) -> Tensor:
    """[C] of bool: the channels that never change, whose running variance is below a millionth of eps.

    What they pass on differs from beta by at most a thousandth of gamma (standard deviation); their factor,
    gamma / sqrt(eps), is larger than that of all others, and would set the range of a whole tensor for nothing
    (arXiv:1803.08607, section 3). MobileNetV1-0.75 has 42 of them.
    """
    return batch_norm.running_var < DEAD * batch_norm.eps  # type: ignore[operator]


def batch_norm_gain(batch_norm: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C]: gamma / sqrt(running_var + eps), what a batch norm multiplies with in eval mode; 0 for `dead_channels`.

    Differentiable in gamma; the running variance is a constant.
    """
    gain = torch.rsqrt(batch_norm.running_var.to(dtype) + batch_norm.eps)  # type: ignore[operator,union-attr]
    if batch_norm.weight is not None:
        gain = gain * batch_norm.weight.to(dtype)  # type: ignore[operator,union-attr]
    return gain.masked_fill(dead_channels(batch_norm), 0)


def folded_weight(weight: Tensor, batch_norm: nn.Module) -> Tensor:
    """The weight that is deployed: `weight * gamma / sqrt(running_var + eps)` per output channel (axis 0).

    Differentiable in `weight` and in gamma; the running variance is a constant. Half precision is computed in float32.
    Of dead channels (`dead_channels`) nothing is deployed but their bias: there it is 0.
    """
    gain = batch_norm_gain(batch_norm, torch.float64 if weight.dtype == torch.float64 else torch.float32)
    return weight.to(gain.dtype) * gain.view(-1, *[1] * (weight.dim() - 1))
