"""Post-training methods, one a file, and the table that makes them known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hf_r2.ptq.adaround import adaround_
from hf_r2.ptq.cora import CoRaOptions, cora_
from hf_r2.ptq.dfq import dfq_
from hf_r2.ptq.mse import mse_
from hf_r2.ptq.nearest import nearest_
from hf_r2.ptq.pdquant import pdquant_
from hf_r2.ptq.percentile import percentile_
from hf_r2.ptq.requant import requant_
from hf_r2.ptq.squant import squant_

__all__ = ["PTQ_METHODS", "PTQMethod"]


@dataclass(frozen=True)
class PTQMethod:
    """A function that sets ranges and roundings on a prepared model, where it comes from, and what it wants.

    `data_free`: works without batches. `data_free_ranges`: without batches, static input ranges come from batch-norm
    statistics, and where these tell nothing from each batch itself. `act_rule`: how static input ranges are set
    afterwards (`InputQuantizer.finish`). `per_tensor_passes`: what is done to the float model first where grids are per tensor,
    unless the options say otherwise (`FloatPasses`); a grid for each channel has no use for equal ranges. `labels`: batches
    keep their labels. `options`: the class that holds and checks the options of a method that takes them as one.
    """

    run: Callable[..., None]
    paper: str
    data_free: bool = False
    data_free_ranges: bool = False
    act_rule: str = "minmax"
    per_tensor_passes: Mapping[str, bool] = field(default_factory=dict)
    labels: bool = False
    options: Callable[..., object] | None = None


EQUALIZED = {"equalize": True, "absorb": True}
PTQ_METHODS: dict[str, PTQMethod] = {
    "nearest": PTQMethod(nearest_, "round to nearest", data_free=True),
    "mse": PTQMethod(mse_, "arXiv:2102.05426", data_free=True, act_rule="mse"),
    "percentile": PTQMethod(percentile_, "quantile clipping", data_free=True, act_rule="percentile"),
    "requant": PTQMethod(requant_, "arXiv:2510.04044", data_free=True, act_rule="mse"),
    "dfq": PTQMethod(dfq_, "arXiv:1906.04721", data_free=True, data_free_ranges=True, per_tensor_passes=EQUALIZED),
    "squant": PTQMethod(squant_, "arXiv:2202.07471", data_free=True, data_free_ranges=True),
    "adaround": PTQMethod(adaround_, "arXiv:2004.10568", act_rule="mse"),
    "pdquant": PTQMethod(pdquant_, "arXiv:2212.07048", act_rule="mse"),
    "cora": PTQMethod(cora_, "arXiv:2408.00923", act_rule="mse", labels=True, options=CoRaOptions),
}
