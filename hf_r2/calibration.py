"""Static ranges of the inputs of quantized layers, from batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_r2.batches import evaluating, run_batch
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.graph.statistics import Statistics

logger = logging.getLogger(__name__)


def static_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    """Input quantizers that need calibration and have none yet, by the name of their layer."""
    found = {n.removesuffix(".input_quantizer"): m for n, m in model.named_modules() if isinstance(m, InputQuantizer)}
    return {name: quantizer for name, quantizer in found.items() if not quantizer.dynamic and not quantizer.ready}


def quantizer_of(layer: nn.Module) -> InputQuantizer | None:
    """The input quantizer of a layer, None without one."""
    found = layer._modules.get("input_quantizer")
    return found if isinstance(found, InputQuantizer) else None


def await_ranges_(model: nn.Module) -> None:
    """Lets static input quantizers pass their input on until they have a range, in place."""
    for module in model.modules():
        if isinstance(module, InputQuantizer) and not module.dynamic:
            module.ready = False


@torch.no_grad()
def range_by_statistics_(model: nn.Module, statistics: Mapping[str, Statistics]) -> None:
    """Sets the static input ranges of the layers whose input `statistics` tells about, in place."""
    for name, quantizer in static_quantizers(model).items():
        if name in statistics:
            quantizer.set_range_(statistics[name].low.min(), statistics[name].high.max())


def make_dynamic_(model: nn.Module) -> None:
    """Lets input quantizers that still have no range take that of each batch, in place; the log names them."""
    for name in static_quantizers(model):
        module = model.get_submodule(name)
        module.add_module("input_quantizer", InputQuantizer(quantizer_of(module).grid.bits, "dynamic"))  # type: ignore[union-attr]
        logger.warning("nothing tells the range of the input of layer %s: it is that of each batch", name)


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable[Mapping[str, Any]] | None, rule: str = "minmax") -> None:
    """Sets the static input ranges of a prepared model by what its layers read over `batches`, in eval mode.

    `rule`: "minmax", "mse" or "percentile" (see `InputQuantizer.finish`). Ranges that are set already stay.

    Raises ValueError where ranges are needed and there are no batches, and for a batch that the model rejects or that
    holds NaN (the batch is numbered, the layer named). A layer that no batch reached loses its input quantizer, with a
    warning in the log.
    """
    quantizers = static_quantizers(model)
    if not quantizers:
        return
    if batches is None:
        raise ValueError(
            "act_bits with static ranges needs batches to calibrate on; pass batches, or act_range='dynamic'"
        )
    for quantizer in quantizers.values():
        quantizer.observing = True
    try:
        with evaluating(model):
            for number, batch in enumerate(batches):
                run_batch(model, batch, number)
                _check_finite(quantizers, number)
    finally:
        for quantizer in quantizers.values():
            quantizer.observing = False
    for name, quantizer in quantizers.items():
        if not quantizer.finish(rule):
            logger.warning("layer %s was not reached by any calibration batch: its input stays in float", name)
            del model.get_submodule(name)._modules["input_quantizer"]


def _check_finite(quantizers: Mapping[str, InputQuantizer], number: int) -> None:
    for name, quantizer in quantizers.items():
        if not quantizer.is_finite():
            raise ValueError(f"batch {number} brings NaN or infinity to the input of layer {name!r}")
