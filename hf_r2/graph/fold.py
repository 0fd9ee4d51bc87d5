"""Folding batch norms into the convolutions before them, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_r2.layers import batch_norm_gain, channel_axis


class FoldedNorm(nn.Identity):
    """Stands where a batch norm was: passes its input on, and remembers the statistics of what passes.

    `mean` and `std` [C] of each channel of the convolution's output: the batch norm's beta, and |gamma| sqrt(var / (var + eps))
    (a dead channel has no variance, whatever its gamma); `gain` [C], what the weights were multiplied with (all float32, not
    stored; None in a model that was loaded). `added_bias`: whether the convolution had no bias of its own. (The name must not
    hold "BatchNorm": transformers initializes what is called that.)
    """

    def __init__(self, norm: nn.Module, added_bias: bool):
        super().__init__()
        self.kind, self.eps, self.features = type(norm), norm.eps, norm.num_features
        self.added_bias = added_bias
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        self.gain: Tensor | None = None


def fold_(model: nn.Module, folds: Mapping[str, str]) -> None:
    """Folds each batch norm of `folds` {convolution: batch norm} into its convolution, in place.

    w' = w gamma / sqrt(var + eps), b' = beta + (b - mean) gamma / sqrt(var + eps), for each output channel: in eval mode
    the model computes the same. Channels that never change (`hf_r2.layers.dead_channels`) get w' = 0 and b' = beta.
    Gradients flow to the new weight, not to gamma.
    """
    for conv_name, norm_name in folds.items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        folded = FoldedNorm(norm, conv.bias is None)
        gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()  # type: ignore[arg-type]
        beta = torch.zeros_like(gamma) if norm.bias is None else norm.bias.detach()  # type: ignore[union-attr]
        var = norm.running_var.double()  # type: ignore[union-attr,operator]
        folded.mean = beta.float().clone()
        folded.std = (gamma.double().abs() * (var / (var + norm.eps)).sqrt()).float()  # type: ignore[operator]
        gain = batch_norm_gain(norm, torch.float64).detach()
        folded.gain = gain.float()
        with torch.no_grad():
            bias = torch.zeros_like(gain) if conv.bias is None else conv.bias.double()  # type: ignore[union-attr,operator]
            bias = beta.double() + (bias - norm.running_mean.double()) * gain  # type: ignore[union-attr,operator]
            shape = [-1 if d == channel_axis(conv) else 1 for d in range(conv.weight.dim())]  # type: ignore[operator,union-attr]
            conv.weight.copy_(conv.weight.double() * gain.view(shape))  # type: ignore[operator,union-attr]
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))  # type: ignore[arg-type]
        model.set_submodule(norm_name, folded)
        conv.__dict__["folded_batch_norm"] = folded  # not registered a second time


def statistics_of(layer: nn.Module) -> FoldedNorm | None:
    """The batch norm that was folded into this layer, if its statistics are known."""
    folded = layer.__dict__.get("folded_batch_norm")
    return folded if folded is not None and folded.mean is not None else None


def build_folded_(model: nn.Module, folds: Mapping[str, str]) -> None:
    """Gives a float skeleton the shape of a folded model, in place: biases to fill, no batch norms."""
    for conv_name, norm_name in folds.items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        model.set_submodule(norm_name, FoldedNorm(norm, conv.bias is None))
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(norm.num_features))  # type: ignore[operator,arg-type]


def unfold_(model: nn.Module, folds: Mapping[str, str]) -> None:
    """Puts batch norms back, in place: with running mean 0 and variance 1, and the convolution's bias as theirs.

    The model computes the same, to the rounding of one factor sqrt(1 + eps) / sqrt(1 + eps), and loads without hf_r2.
    """
    for conv_name, norm_name in folds.items():
        conv, folded = model.get_submodule(conv_name), model.get_submodule(norm_name)
        norm = folded.kind(folded.features, eps=folded.eps)  # type: ignore[operator]
        norm.to(device=conv.bias.device, dtype=conv.bias.dtype)  # type: ignore[union-attr]
        with torch.no_grad():
            norm.weight.fill_((1 + folded.eps) ** 0.5)  # type: ignore[operator]
            if folded.added_bias:
                norm.bias.copy_(conv.bias)  # type: ignore[arg-type]
                conv.register_parameter("bias", None)
        norm.train(model.training)
        model.set_submodule(norm_name, norm)
