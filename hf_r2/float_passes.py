"""What is done to the float model before its weights are quantized: batch norms folded, layers equalized."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_r2.graph import example_inputs, read_graph
from hf_r2.graph.chains import Pair, batch_norm_folds, chains
from hf_r2.graph.equalize import RELU6, ClippedReLU, clipped_relu, equalize_, unclip_
from hf_r2.graph.fold import build_folded_, fold_, unfold_
from hf_r2.layers import BATCH_NORMS, dead_channels
from hf_r2.names import relative_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FloatPasses:
    """Options that every post-training method takes; raises ValueError for a value that makes no sense.

    `fold`: fold batch norms into the convolutions before them; None: where a graph can be read. `equalize`: cross-layer
    equalization (DFQ), `absorb`: high-bias absorption after it; None: as the method wants it (only `dfq` does, where grids
    are per tensor). `relu6`: what becomes of a ReLU6 between equalized layers, see `equalize_`.
    """

    fold: bool | None = None
    equalize: bool | None = None
    absorb: bool | None = None
    relu6: str = "clip"

    def __post_init__(self) -> None:
        if self.relu6 not in RELU6:
            raise ValueError(f"relu6 must be one of {', '.join(RELU6)}; got {self.relu6!r}")
        for name in ("fold", "equalize", "absorb"):
            if getattr(self, name) not in (True, False, None):
                raise ValueError(f"{name} must be true, false or None, got {getattr(self, name)!r}")
        if self.fold is False and self.equalize:
            raise ValueError("equalize works on folded batch norms: it cannot go with fold=False")


def apply_passes_(model: nn.Module, passes: FloatPasses, batch: Mapping[str, Any] | None) -> dict[str, Any]:
    """Runs the passes, in place; returns the record of what changed in the skeleton, for config.json.

    Keys: "folded" {convolution: batch norm}, "clipped" {activation: {"first", "second"}}, "replaced" [activations],
    "notes" (what was done and what was left out, in words); names without the base model's prefix. `batch` is what the graph
    is read with; None: made from the model's config.

    Raises ValueError where a pass was asked for and the graph cannot be read.
    """
    if not passes.equalize and (passes.fold is False or not any(isinstance(m, BATCH_NORMS) for m in model.modules())):
        return {}
    try:
        graph = read_graph(model, example_inputs(model) if batch is None else batch)
    except ValueError as error:
        if passes.fold or passes.equalize:
            raise
        logger.warning("batch norms are not folded: %s", error)
        return {}
    folds, pairs = batch_norm_folds(graph, model), chains(graph, model)
    dead = sum(int(dead_channels(model.get_submodule(norm)).sum()) for norm in folds.values())
    fold_(model, folds)
    notes = [f"{len(folds)} batch norms folded", *([f"{dead} dead channels left out"] if dead else [])]
    record: dict[str, Any] = {"folded": _relative(model, folds), "notes": notes}
    if passes.equalize:
        _equalize_(model, pairs, passes, record)
    return record


def _relative(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    return {relative_name(model, a): relative_name(model, b) for a, b in names.items()}


def _equalize_(model: nn.Module, pairs: list[Pair], passes: FloatPasses, record: dict[str, Any]) -> None:
    done = equalize_(model, pairs, passes.relu6, bool(passes.absorb))
    by_module = {pair.activation_module: pair for pair in pairs}
    for module, kind in done.relu6.items():
        pair, name = by_module[module], relative_name(model, module)
        if kind == "clip":
            ends = {"first": pair.first, "second": pair.second}
            record.setdefault("clipped", {})[name] = {k: relative_name(model, v) for k, v in ends.items()}
        else:
            record.setdefault("replaced", []).append(name)
    notes = [f"{done.pairs} pairs equalized", f"{len(done.relu6)} ReLU6 between them: {passes.relu6}"]
    notes += [f"left alone: {reason}" for reason in done.skipped]
    record["notes"] += notes + ([f"high biases absorbed in {done.absorbed} pairs"] if passes.absorb else [])
    if not pairs:
        logger.warning("equalization found no pair of layers without a branch between them; nothing was equalized")


def build_skeleton_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Gives a float skeleton the shape that `apply_passes_` left behind, in place."""
    here = {relative_name(model, name): name for name, _ in model.named_modules()}
    build_folded_(model, {here[a]: here[b] for a, b in record.get("folded", {}).items() if a in here and b in here})
    for name, ends in record.get("clipped", {}).items():
        if name in here:
            model.set_submodule(here[name], clipped_relu(model.get_submodule(here[ends["first"]])))
    for name in record.get("replaced", []):
        if name in here:
            model.set_submodule(here[name], nn.ReLU())


def undo_passes_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Takes a dequantized float model back to the skeleton that transformers builds, in place; it computes the same."""
    here = {relative_name(model, name): name for name, _ in model.named_modules()}
    clipped = {here[name]: ends for name, ends in record.get("clipped", {}).items() if name in here}
    pairs = [Pair(here[e["first"]], here[e["second"]], "relu6", name) for name, e in clipped.items()]
    unclip_(model, [p for p in pairs if isinstance(model.get_submodule(p.activation_module), ClippedReLU)])  # type: ignore[arg-type]
    unfold_(model, {here[a]: here[b] for a, b in record.get("folded", {}).items() if a in here and b in here})
    if record.get("replaced"):
        logger.warning(
            "ReLU6 was replaced by ReLU: saved and loaded without hf_r2, the model computes with ReLU6 again"
        )
