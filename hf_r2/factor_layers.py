"""Two factors as two layers: what an adapter is to a runtime that keeps it beside the rounded layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.layers import CONVOLUTIONS


@torch.no_grad()
def factor_layers(layer: nn.Module, left: Tensor, right: Tensor, kernel: str) -> nn.Sequential:
    """Two linear layers or two convolutions, without biases, whose composition has the weight `fold(left @ right, kernel)`.

    `left` [m, r], `right` [r, n], `kernel` as in `hf_r2.lowrank`. For a convolution with kernel "right" the first one has the
    kernel, stride, padding and dilation of `layer`, and the second is 1 x 1; with "left" the other way round. Groups share the
    first factor: it is repeated for each (CoRa, arXiv:2408.00923, theorem 1 and its code).

    Raises TypeError for a layer that is neither linear nor a convolution, ValueError for factors that do not fit it.
    """
    size = layer.weight[0, 0].numel() if isinstance(layer, CONVOLUTIONS) else 1
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        raise TypeError(
            f"only linear layers and convolutions have factors that are layers, got {type(layer).__name__}"
        )
    rows, columns = layer.weight.shape[:2]
    wanted = (rows, columns * size) if kernel == "right" else (rows * size, columns)
    if (left.shape[0], right.shape[1]) != wanted or left.shape[1] != right.shape[0]:
        raise ValueError(
            f"factors of shapes {list(left.shape)} and {list(right.shape)} do not fit: needed are [{wanted[0]}, r] and "
            f"[r, {wanted[1]}]"
        )
    rank = left.shape[1]
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            _with(nn.Linear(columns, rank, bias=False), right), _with(nn.Linear(rank, rows, bias=False), left)
        )
    build: Any = type(layer)  # the three classes differ in how they write a size
    groups = layer.groups
    spatial = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }
    shape, point = layer.weight.shape[2:], (1,) * (layer.weight.dim() - 2)
    first, second = (shape, point) if kernel == "right" else (point, shape)
    one = build(
        layer.in_channels, groups * rank, first, groups=groups, bias=False, **(spatial if kernel == "right" else {})
    )
    two = build(groups * rank, rows, second, groups=groups, bias=False, **({} if kernel == "right" else spatial))
    each = right.reshape(rank, columns, *first).repeat(groups, *[1] * (layer.weight.dim() - 1))
    last = left if kernel == "right" else left.reshape(rows, size, rank).transpose(1, 2)
    return nn.Sequential(_with(one, each), _with(two, last.reshape(rows, rank, *second)))


def _with(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone())
    return layer
