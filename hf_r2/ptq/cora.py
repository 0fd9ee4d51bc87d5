"""CoRa (arXiv:2408.00923): low-rank adapters that give back what rounding took, their ranks found by gradient."""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_r2.attach import encoder_of, prepared_layers, replace_encoder_
from hf_r2.batches import checked, evaluating, run_batch, samples_in
from hf_r2.dressed import FLOAT_BIAS, float_weights, set_bias_
from hf_r2.encoders.adapted import Adapted, Filtered
from hf_r2.layers import WeightLayer, is_table
from hf_r2.lowrank import LowRank, cheaper_side, check_adapter_bits, unfold
from hf_r2.ptq.adaround import adaround_
from hf_r2.ptq.allowed import ANY_COUNT, ONE_OR_MORE, POSITIVE, SWITCH, check_values
from hf_r2.ptq.input_moments import InputMoments, input_moments
from hf_r2.ptq.mse import mse_
from hf_r2.ptq.nearest import nearest_
from hf_r2.ptq.rank_search import Found, SearchSettings, search_cutoffs
from hf_r2.ptq.reconstruct import main_logits, prediction_difference
from hf_r2.ptq.residual import Residual, equal_share, factorize, spend
from hf_r2.ptq.squant import squant_
from hf_r2.ptq.tap_means import tap_means
from hf_r2.ptq.walk import frozen

logger = logging.getLogger(__name__)
BASES: dict[str, Callable[..., None]] = {"nearest": nearest_, "mse": mse_, "squant": squant_, "adaround": adaround_}
RANKS = ("search", "equal")
TEACHERS = ("logits", "labels")
METRICS = ("inputs", "weights")
OWN = {
    **dict.fromkeys(("order", "iters", "batch_size", "samples"), ONE_OR_MORE),
    **dict.fromkeys(("lr", "gamma"), POSITIVE),
    **dict.fromkeys(("correct_bias", "progress"), SWITCH),
    "seed": ANY_COUNT,
}


@dataclass(frozen=True, kw_only=True)
class CoRaOptions:
    """Options of `cora_`; raises ValueError for a value that it cannot take, TypeError for an unknown option of the base.

    `base`: the method that rounds (nearest, mse, squant, adaround), with `base_options`. `budget`: numbers in all adapters, as
    a share of the weights of linear and convolution layers, above 0 and at most 1. `adapter_bits`: their width, 2 to 8, or 16
    for float16 (the paper's equivalent widths take 8; of equal effective bits, twice the ranks at 4 bits were better here).

    `ranks`: "search" (cut-offs by gradient) or "equal" (the heuristic: each adapter takes the same share of its layer).
    `metric`: "inputs" decomposes the residual in the metric of what the layer reads, so that the first components are those
    that the output misses most; "weights" is the paper's plain decomposition, which takes the roundings of squant and adaround
    for noise. `teacher`: "logits" (KL to the float model's prediction) or "labels" (cross entropy; the batches' `labels`).

    `order` of the Butterworth kernel; `iters` steps of Adam at `lr` on batches of `batch_size`, drawn in turn from `samples`
    calibration samples; `gamma`: the budget's penalty, in units of the first loss. `correct_bias` (not in the paper): biases
    make up for the mean error that is left, in place of the base method's correction, which made up for what the adapters
    now give back. `trace_file`: a JSON file for ranks, cut-offs, singular values, losses and seconds.
    """

    base: str = "squant"
    base_options: Mapping[str, Any] = field(default_factory=dict)
    budget: float = 0.05
    adapter_bits: int = 4
    ranks: str = "search"
    metric: str = "inputs"
    teacher: str = "logits"
    order: int = 4
    iters: int = 25
    lr: float = 0.4
    gamma: float = 0.1
    batch_size: int = 16
    correct_bias: bool = True
    samples: int = 512
    seed: int = 0
    progress: bool = True
    trace_file: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("base", tuple(BASES)), ("ranks", RANKS), ("teacher", TEACHERS), ("metric", METRICS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not 0 < self.budget <= 1:
            raise ValueError(
                f"budget must be above 0 and at most 1, got {self.budget!r}: what the adapters may hold, as a share "
                "of the weights"
            )
        check_adapter_bits(self.adapter_bits)
        known = [p.name for p in inspect.signature(BASES[self.base]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if unknown := sorted(set(self.base_options) - set(known)):
            raise TypeError(
                f"base {self.base!r} has no option {', '.join(unknown)}; its options are: {', '.join(known) or 'none'}"
            )
        check_values(self.base_options)
        check_values(vars(self), OWN)


def cora_(model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None, **options: Any) -> None:
    """Rounds a prepared model by another method, and gives its layers adapters of the ranks that help most; see `CoRaOptions`.

    The residual W - Q(W) of each linear and convolution layer is decomposed once. The ranks spend the budget exactly: no
    further rank of any layer fits. Tables, layers that share their weight and layers without a residual get no adapter; the
    log names them.

    Raises ValueError for an option that it cannot take, batches that the model rejects, labels asked for and not there, and
    for a residual that cannot be factorized (the layer is named).
    """
    chosen = CoRaOptions(**options)
    data = _pieces(checked(batches, chosen.samples, labels=chosen.teacher == "labels"), chosen.batch_size)
    clock = _Clock()
    BASES[chosen.base](model, data, **chosen.base_options)
    clock.lap("base")
    with evaluating(model), frozen(model):
        layers, weights = _adaptable(model)
        biased = prepared_layers(model) if chosen.correct_bias else []
        metrics = {n: (x, cheaper_side(x.weight.shape)) for n, x in layers.items() if chosen.metric == "inputs"}
        with float_weights(model), input_moments(metrics, len(data), centered=chosen.correct_bias) as moments:
            means, outputs = tap_means(model, biased, data)
        clock.lap("teacher")
        residuals = _factorize(layers, moments)
        clock.lap("svd")
        numbers = chosen.budget * weights
        wanted, found = equal_share(residuals, chosen.budget), None
        if chosen.ranks == "search" and any(r.cost <= numbers for r in residuals):
            found = _search(
                model, layers, residuals, means, _loss_of(model, data, outputs, chosen.teacher), numbers, chosen
            )
            wanted = found.cutoffs
        clock.lap("search")
        ranks = spend(wanted, residuals, numbers)
        for residual, rank in zip(residuals, ranks, strict=True):
            if rank:
                _adapt_(model, layers[residual.name], residual, rank, chosen.adapter_bits)
        for layer in prepared_layers(model):
            if layer.name in means:
                _correct_bias_(layer, means[layer.name])
    used = sum(rank * r.cost for rank, r in zip(ranks, residuals, strict=True))
    logger.info("cora: ranks %s; %d numbers, %.3g of %d weights", ranks, used, used / max(weights, 1), weights)
    if chosen.trace_file is not None:
        _write_trace(Path(chosen.trace_file), residuals, ranks, found, clock.laps)


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.start = time.perf_counter()

    def lap(self, name: str) -> None:
        """Notes the seconds since the last lap."""
        now = time.perf_counter()
        self.laps[name], self.start = now - self.start, now


def _pieces(batches: Iterable[Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """The batches cut to at most `size` samples each."""
    return [
        {k: v[i : i + size] if isinstance(v, Tensor) and v.dim() and len(v) == count else v for k, v in batch.items()}
        for batch in batches
        for count in [samples_in(batch)]
        for i in range(0, count, size)
    ]


def _adaptable(model: nn.Module) -> tuple[dict[str, WeightLayer], int]:
    """The layers that can have an adapter by name, and how many weights all layers but tables have, shared ones once."""
    groups: dict[int, list[WeightLayer]] = {}
    for layer in prepared_layers(model):
        groups.setdefault(id(layer.weight), []).append(layer)
    shared = [layer.name for group in groups.values() if len(group) > 1 for layer in group]
    if shared:
        logger.warning("cora: no adapter for layers that share their weight: %s", ", ".join(shared))
    kept = [group for group in groups.values() if not any(is_table(layer.module) for layer in group)]
    alone = {group[0].name: group[0] for group in kept if len(group) == 1}
    return alone, sum(group[0].weight.numel() for group in kept)


@torch.no_grad()
def _error(layer: WeightLayer) -> Tensor:
    """W_hat - W of a prepared layer, float32."""
    return encoder_of(layer).encode(layer.weight).decode() - layer.weight.float()  # type: ignore[operator]


def _factorize(layers: Mapping[str, WeightLayer], moments: Mapping[str, InputMoments]) -> list[Residual]:
    roots = {name: m.root() for name, m in moments.items() if m.count}
    found = {name: factorize(name, -_error(layer), roots.get(name)) for name, layer in layers.items()}
    exact = [name for name, residual in found.items() if residual is None]
    if exact:
        logger.warning("cora: no adapter for layers that rounding left as they were: %s", ", ".join(exact))
    return [residual for residual in found.values() if residual is not None]


def _loss_of(
    model: nn.Module, data: Sequence[Mapping[str, Any]], outputs: Sequence[Any], teacher: str
) -> Callable[[int], Tensor]:
    """The loss of a step: KL of the float model's prediction, or the cross entropy of the labels; steps go round the data."""
    if teacher == "labels":
        for number, batch in enumerate(data):
            if not isinstance(batch.get("labels"), Tensor):
                raise ValueError(
                    f"teacher='labels' needs a tensor of labels in every batch; batch {number} has {', '.join(batch)}"
                )
    targets = [main_logits(output).float() for output in outputs]

    def loss(step: int) -> Tensor:
        number = step % len(data)
        logits = main_logits(run_batch(model, data[number], number)).float()
        if teacher == "labels":
            return F.cross_entropy(logits.flatten(0, -2), data[number]["labels"].to(logits.device).flatten())
        return prediction_difference(logits, targets[number], 1.0)

    return loss


def _search(
    model: nn.Module, layers: Mapping[str, WeightLayer], residuals: Sequence[Residual], means: Mapping[str, Tensor],
    loss_of: Callable[[int], Tensor], numbers: float, options: CoRaOptions,
) -> Found:  # fmt: skip
    """The cut-offs, searched from the equal share on; encoders are as before afterwards, biases corrected for them."""
    filters, handles, before = [], [], {}
    for layer in prepared_layers(model):
        if layer.name in means:
            _correct_bias_(layer, means[layer.name])
    for residual, start in zip(residuals, equal_share(residuals, options.budget), strict=True):
        layer = layers[residual.name]
        # What costs twice the budget is out of reach: its filtered tail is not worth its multiplications.
        top = min(residual.full_rank, max(1, int(2 * numbers / residual.cost)))
        left, right = residual.left[:, :top] * residual.values[:top], residual.right[:top]
        rounded = layer.weight.detach().float() + _error(layer)
        filtered = Filtered(rounded, left, right, residual.kernel, options.order, max(start, 0.5))
        before[residual.name] = encoder_of(layer)
        replace_encoder_(model, layer, filtered)
        if layer.name in means:
            handles.append(layer.module.register_forward_hook(_mean_keeper(layer, filtered, means[layer.name])))
        filters.append(filtered)
    settings = SearchSettings(
        iters=options.iters, lr=options.lr, gamma=options.gamma, progress=options.progress
    )  # fmt: skip
    try:
        return search_cutoffs(filters, residuals, loss_of, numbers, settings)
    finally:
        for handle in handles:
            handle.remove()
        for name, encoder in before.items():
            replace_encoder_(model, layers[name], encoder)


def _mean_keeper(layer: WeightLayer, filtered: Filtered, means: Tensor) -> Callable[..., Tensor]:
    """A forward hook that takes the mean of what the filtered components add off the layer's output.

    The bias is corrected for the rounded weight alone; what each component brings back of the mean is known beforehand.
    """
    shares = filtered.left * (unfold(means, filtered.kernel) @ filtered.right.T)  # [m, R]
    shares = shares.view(means.shape[0], -1, shares.shape[1]).sum(1)
    linear = isinstance(layer.module, nn.Linear)

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        shift = shares @ filtered.gain()
        return output - (shift if linear else shift.view(-1, *[1] * (output.dim() - 2))).to(output.dtype)

    return keep


def _adapt_(model: nn.Module, layer: WeightLayer, residual: Residual, rank: int, bits: int) -> None:
    stored = LowRank.of(*residual.factors(rank), residual.kernel, bits)
    replace_encoder_(model, layer, Adapted(encoder_of(layer), stored))


def _correct_bias_(layer: WeightLayer, means: Tensor) -> None:
    """Makes the layer's float bias up for the mean error of its quantized weight, in place.

    Not the bias that the base method has corrected: it made up for what the adapter now gives back.
    """
    bias = layer.module.__dict__.get(FLOAT_BIAS, layer.module._parameters["bias"])
    error = (_error(layer) * means).flatten(1).sum(1)
    set_bias_(layer.module, bias - error.to(bias.dtype))


def _write_trace(
    path: Path, residuals: Sequence[Residual], ranks: Sequence[int], found: Found | None, seconds: Mapping[str, float]
) -> None:
    layers = [
        {
            "name": r.name, "kernel": r.kernel, "numel": r.numel, "cost": r.cost, "rank": rank,
            "cutoff": None if found is None else found.cutoffs[i], "singular_values": r.values.tolist(),
        }
        for i, (r, rank) in enumerate(zip(residuals, ranks, strict=True))
    ]  # fmt: skip
    trace = {"layers": layers, "losses": [] if found is None else found.losses, "seconds": dict(seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace, indent=1))
