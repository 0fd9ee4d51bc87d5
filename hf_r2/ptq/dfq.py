"""Data-free quantization (DFQ, arXiv:1906.04721): bias correction, after equalization and absorption of the float model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_r2.attach import encoder_of, prepared_layers
from hf_r2.batches import checked, evaluating
from hf_r2.calibration import range_by_statistics_
from hf_r2.dressed import float_weights, set_bias_
from hf_r2.graph import example_inputs, find_blocks, read_graph
from hf_r2.graph.equalize import grouped
from hf_r2.graph.statistics import Statistics, input_statistics
from hf_r2.layers import WeightLayer, is_table
from hf_r2.ptq.bias import match_mean_
from hf_r2.ptq.walk import walk

logger = logging.getLogger(__name__)
CORRECTIONS = ("analytic", "empirical", "none")


def dfq_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    bias_correction: str = "analytic",
    progress: bool = True,
) -> None:
    """Corrects the biases of a prepared model for the mean error of its rounded weights, and ranges its inputs, data-free.

    Cross-layer equalization and high-bias absorption come before, on the float model (`equalize_`). "analytic" (eq. 17):
    b' = b - (W_hat - W) E[x], E[x] of the rectified normal that the folded batch norm before gives; "empirical" (appendix D):
    b' = b - mean of (quantized output - float output) over `batches`, layer after layer; "none". Input ranges come from
    batch-norm statistics (mean +- 6 std, section 4.3) where these are known. Layers without bias or without a known
    input are left as they are; the log says how many.

    Raises ValueError for an unknown correction, for "empirical" without batches, and for a model whose graph cannot be
    read (see `read_graph`).
    """
    if bias_correction not in CORRECTIONS:
        raise ValueError(f"bias_correction must be one of {', '.join(CORRECTIONS)}; got {bias_correction!r}")
    if bias_correction == "empirical" and batches is None:
        raise ValueError("bias_correction='empirical' compares outputs over batches: pass batches")
    data = None if batches is None else checked(batches)
    with evaluating(model):
        with float_weights(model):
            graph = read_graph(model, data[0] if data else example_inputs(model))
        statistics = input_statistics(graph, model)
        if not statistics:
            logger.warning("dfq: no batch norm was folded; no range comes from statistics, and no analytic correction")
        range_by_statistics_(model, statistics)
        layers = {layer.name: layer for layer in prepared_layers(model) if not is_table(layer.module)}
        if bias_correction == "analytic":
            done = sum(_correct_analytic_(layer, statistics.get(name)) for name, layer in layers.items())
            logger.info("dfq: biases of %d of %d layers corrected from statistics", done, len(layers))
        elif bias_correction == "empirical":
            assert data is not None
            with tqdm(total=len(layers), desc="dfq", unit="layer", disable=not progress) as bar:
                for step in walk(model, find_blocks(graph, model), data):
                    for name in [name for name in step.block.layers if name in layers]:
                        match_mean_(model, step, layers[name])
                        bar.update()


@torch.no_grad()
def _correct_analytic_(layer: WeightLayer, statistics: Statistics | None) -> int:
    """Returns 1 if the bias was corrected."""
    bias = layer.module._parameters.get("bias")
    if bias is None or statistics is None:
        return 0
    error = encoder_of(layer).encode(layer.weight).decode() - layer.weight.float()  # type: ignore[operator]
    kernels = grouped(layer.module, error).sum(3)  # [groups, out / groups, in / groups]
    set_bias_(layer.module, bias - (kernels * statistics.mean.view(kernels.shape[0], 1, -1)).sum(2).flatten())
    return 1
