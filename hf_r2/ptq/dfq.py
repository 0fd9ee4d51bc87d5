"""Data-free quantization (DFQ, arXiv:1906.04721): bias correction, after equalization and absorption of the float model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from hf_r2.attach import prepared_layers
from hf_r2.batches import checked, evaluating
from hf_r2.calibration import range_by_statistics_
from hf_r2.dressed import float_weights
from hf_r2.graph import example_inputs, find_blocks, read_graph
from hf_r2.graph.statistics import input_statistics
from hf_r2.layers import is_table
from hf_r2.ptq.bias import correct_by_statistics_, match_mean_
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

    Where grids are per tensor, cross-layer equalization and high-bias absorption come before, on the float model
    (`equalize_`); the options `equalize` and `absorb` ask for them, or forbid them, anywhere. "analytic" (eq. 17):
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
            correct_by_statistics_(layers.values(), statistics)
        elif bias_correction == "empirical":
            assert data is not None
            with tqdm(total=len(layers), desc="dfq", unit="layer", disable=not progress) as bar:
                for step in walk(model, find_blocks(graph, model), data):
                    for name in [name for name in step.block.layers if name in layers]:
                        match_mean_(model, step, layers[name])
                        bar.update()
