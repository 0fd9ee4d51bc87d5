"""Bias correction: from batch-norm statistics, or from the outputs over batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.attach import encoder_of
from hf_r2.dressed import float_weights, set_bias_
from hf_r2.graph.capture import Call, run_block
from hf_r2.graph.equalize import grouped
from hf_r2.graph.statistics import Statistics
from hf_r2.layers import CONVOLUTIONS, TRANSPOSED, WeightLayer
from hf_r2.ptq.walk import Step

logger = logging.getLogger(__name__)


@torch.no_grad()
def correct_by_statistics_(layers: Iterable[WeightLayer], statistics: Mapping[str, Statistics]) -> None:
    """b' = b - (W_hat - W) E[x] for the prepared layers whose input `statistics` tells about, in place (DFQ, eq. 17).

    Layers without a bias or without a known input are left as they are; the log says how many were corrected.
    """
    done, every = 0, list(layers)
    for layer in every:
        bias, known = layer.module._parameters.get("bias"), statistics.get(layer.name)
        if bias is not None and known is not None:
            error = encoder_of(layer).encode(layer.weight).decode() - layer.weight.float()  # type: ignore[operator]
            kernels = grouped(layer.module, error).sum(3)  # [groups, out / groups, in / groups]
            set_bias_(layer.module, bias - (kernels * known.mean.view(kernels.shape[0], 1, -1)).sum(2).flatten())
            done += 1
    logger.info("biases of %d of %d layers corrected from statistics", done, len(every))


@torch.no_grad()
def match_mean_(model: nn.Module, step: Step, layer: WeightLayer) -> None:
    """Takes the mean of (quantized output - float output) off the bias of a layer, in place; without a bias nothing happens.

    Each model's own inputs count, so the error of the layers before is made up for too (DFQ, arXiv:1906.04721, appendix D).
    """
    bias = layer.module._parameters.get("bias")
    if bias is None:
        return
    with float_weights(model):
        true = mean_output(model, step, step.floats, layer)
    set_bias_(layer.module, bias - (mean_output(model, step, step.calls, layer) - true))


def mean_output(model: nn.Module, step: Step, calls: list[Call], layer: WeightLayer) -> Tensor:
    """The mean of each output channel of a layer over the calls of its block."""
    axis = 1 if isinstance(layer.module, (*CONVOLUTIONS, *TRANSPOSED)) else -1
    sums: list[tuple[Tensor, int]] = []

    def add(_: nn.Module, __: Any, output: Tensor) -> None:
        rows = output.detach().movedim(axis, -1).reshape(-1, output.shape[axis])
        sums.append((rows.double().sum(0), len(rows)))

    handle = layer.module.register_forward_hook(add)
    try:
        for call in calls:
            run_block(model, step.block, call)
    finally:
        handle.remove()
    total, count = sum((s for s, _ in sums), torch.zeros(())), sum(n for _, n in sums)
    return total / max(1, count)  # type: ignore[operator]
