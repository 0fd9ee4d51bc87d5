"""The plots of a run: weights before and after, ranges per layer, score against bits per weight, ranks of adapters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for colour-blind readers; each line also has its own marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_LEVELS = 256  # what 8 bits can hold in one tensor; scales per channel give more, which then are a histogram


def plot_weights(before: Tensor, after: Tensor, path: str | os.PathLike[str], name: str) -> None:
    """Histogram of a layer's float weight, and the share of weights at each of its quantized levels, to a PNG.

    `before` and `after` have the same shape, in the units of the weight. Levels are drawn as stems where there are at
    most 256 (one grid or palette for the tensor), else as a histogram.

    Raises ValueError for shapes that differ, an empty tensor, or a NaN or Inf.
    """
    if before.shape != after.shape or before.numel() == 0:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"before and after must have the same shape and not be empty, got {shapes}")
    before, after = before.detach().float().cpu().flatten(), after.detach().float().cpu().flatten()
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError(f"the weights of {name!r} hold NaN or Inf: there is nothing to draw")
    figure, axes = _figure()
    bins = torch.histogram(before, bins=100)
    share = 100 / before.numel()
    axes.stairs(
        (bins.hist * share).tolist(), bins.bin_edges.tolist(), fill=True, color=COLOURS[5], alpha=0.7,
        label=f"float, range {float(before.max() - before.min()):.3g}",
    )  # fmt: skip
    axes.set(xlabel="weight", ylabel="float weights in each of 100 bins (%)", title=f"Weights of {name}")
    other = axes.twinx()  # a level holds many bins' worth of weights, so it has its own scale
    levels, counts = after.unique(return_counts=True)
    if len(levels) <= MOST_LEVELS:
        label = f"quantized, {len(levels)} level{'s' if len(levels) > 1 else ''}"
        other.set_ylabel("quantized weights at each level (%)")
        other.vlines(levels.tolist(), 0, (counts * share).tolist(), color=COLOURS[1], linewidth=1.5, label=label)
        other.scatter(levels.tolist(), (counts * share).tolist(), color=COLOURS[1], s=14 if len(levels) <= 32 else 4)
    else:
        bins = torch.histogram(after, bins=100)
        other.set_ylabel("quantized weights in each of 100 bins (%)")
        other.stairs(
            (bins.hist * share).tolist(), bins.bin_edges.tolist(), color=COLOURS[1],
            label=f"quantized, {len(levels)} values over all channels",
        )  # fmt: skip
    other.set_ylim(bottom=0)
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    _legend(figure, handles)
    _save(figure, path)


def plot_ranges(summaries: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> None:
    """Box plot of range / std over the layers, one box for each run, to a PNG.

    `summaries` holds `RangeLoss.summary()` by the run's label; range and std are in the units of the weight, their
    ratio has none. Constant weights (std 0) have no ratio and are left out. Boxes are quartiles, whiskers 1.5
    times the quartile distance, each dot is one layer.

    Raises ValueError for no run, or a run without any layer of std above 0.
    """
    if not summaries:
        raise ValueError("summaries must hold at least one run, got none")
    ratios = {label: _ratios(label, layers) for label, layers in summaries.items()}
    figure, axes = _figure(width=max(4.0, 2.0 + 1.4 * len(ratios)))
    boxes = axes.boxplot(list(ratios.values()), widths=0.5, showfliers=False, patch_artist=True)
    for i, (box, median, values) in enumerate(zip(boxes["boxes"], boxes["medians"], ratios.values(), strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        box.set(facecolor=colour, alpha=0.35)
        median.set(color="black", linewidth=1.5)
        spread = torch.linspace(-0.15, 0.15, len(values)).tolist() if len(values) > 1 else [0.0]
        axes.scatter([i + 1 + x for x in spread], values, color=colour, s=10, zorder=3)
    axes.set_xticks(
        range(1, len(ratios) + 1), [f"{k}\n{len(v)} layer{'s' if len(v) > 1 else ''}" for k, v in ratios.items()]
    )
    axes.set(title="Range of the weights, layer by layer", ylabel="range / std of a layer's weight")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    _save(figure, path)


def plot_accuracy(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], metric: str = "accuracy") -> None:
    """The metric against effective bits per weight, one line for each method, run and activation width, to a PNG.

    `rows` are the results of metrics.json. Accuracy and f1 are fractions and drawn in percent. Rows whose
    `weight_bits` is None (float) are horizontal lines, one for each run. The horizontal axis is
    logarithmic, with bits per weight as measured (scales and palettes counted).

    Raises ValueError for no row, or a row that lacks a key.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows must hold at least one result, got none")
    needed = ("method", "weight_bits", "act_bits", "granularity", "range_loss", "bits_per_weight", metric)
    for index, row in enumerate(rows):
        if missing := [key for key in needed if key not in row]:
            raise ValueError(f"rows[{index}] lacks {', '.join(missing)}; a row needs {', '.join(needed)}")
    percent = 100 if metric in ("accuracy", "f1") else 1
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(_line(row), []).append((row["bits_per_weight"], percent * row[metric]))
    is_float = {_line(row): row["weight_bits"] is None for row in rows}
    figure, axes = _figure(width=8.0)
    for i, (label, points) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "label": label}
        if is_float[label]:
            axes.axhline(max(y for _, y in points), linestyle="--", linewidth=1.2, **style)
        else:
            dashes = "-" if i < len(COLOURS) else ":"  # the second round of colours
            axes.plot(*zip(*sorted(points), strict=True), dashes, marker=MARKERS[i % len(MARKERS)], **style)
    unit = " (%)" if percent == 100 else ""
    axes.set(xlabel="bits per weight, scales and palettes counted", ylabel=f"{metric}{unit}")
    axes.set_title(f"{metric.capitalize()} against bits per weight")
    _bit_ticks(axes, [x for label, points in lines.items() if not is_float[label] for x, _ in points])
    axes.grid(alpha=0.3)
    _legend(figure, axes.get_legend_handles_labels()[0])
    _save(figure, path)


def plot_ranks(traces: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """The rank of each layer's low-rank adapter, one line for each run, to a PNG.

    `traces` holds what `cora` writes to its `trace_file`, by the run's label. Layers are in the order of the model, from 1 on;
    a layer that a run left without an adapter has rank 0 there.

    Raises ValueError for no run, or runs without any layer.
    """
    names = list(dict.fromkeys(layer["name"] for trace in traces.values() for layer in trace["layers"]))
    if not names:
        raise ValueError("traces must hold at least one run with at least one layer, got none")
    figure, axes = _figure(width=8.0)
    for i, (label, trace) in enumerate(traces.items()):
        ranks = {layer["name"]: layer["rank"] for layer in trace["layers"]}
        numbers = sum(layer["rank"] * layer["cost"] for layer in trace["layers"])
        axes.plot(
            range(1, len(names) + 1), [ranks.get(name, 0) for name in names], marker=MARKERS[i % len(MARKERS)], markersize=4,
            color=COLOURS[i % len(COLOURS)], linewidth=1, label=f"{label}, {numbers:,} numbers",
        )  # fmt: skip
    axes.set(title="Ranks of the adapters, layer by layer", xlabel="layer", ylabel="rank")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _legend(figure, axes.get_legend_handles_labels()[0])
    _save(figure, path)


def plot_singular_values(layer: Mapping[str, Any], path: str | os.PathLike[str], order: int = 4) -> None:
    """The singular values of a layer's residual, what the searched kernel lets pass of them, and the rank, to a PNG.

    `layer` is one of the `layers` in a trace of `cora` (`name`, `singular_values`, `rank`, `cutoff` or None), `order` that of
    its Butterworth kernel. Values are in the units of the layer's output error (of the weight with `metric="weights"`).

    Raises ValueError for a layer without singular values.
    """
    values = list(layer["singular_values"])
    if not values:
        raise ValueError(f"layer {layer['name']!r} has no singular values: there is nothing to draw")
    ranks = list(range(1, len(values) + 1))
    figure, axes = _figure()
    axes.plot(ranks, values, color=COLOURS[0], label=f"{len(values)} singular values")
    if layer["cutoff"] is not None:
        cutoff = layer["cutoff"]
        passed = [v / (1 + ((rank - 0.5) / cutoff) ** (2 * order)) for v, rank in zip(values, ranks, strict=True)]
        axes.fill_between(ranks, passed, color=COLOURS[5], alpha=0.5, label="passed by the kernel while searching")
        axes.axvline(cutoff, color=COLOURS[1], linestyle="--", label=f"cut-off {cutoff:.1f}")
    axes.axvline(layer["rank"], color=COLOURS[6], linewidth=1, label=f"rank {layer['rank']}")
    axes.set(title=f"Residual of {layer['name']}", xlabel="rank", ylabel="singular value")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _legend(figure, axes.get_legend_handles_labels()[0])
    _save(figure, path)


def _ratios(label: str, layers: Sequence[Mapping[str, Any]]) -> list[float]:
    ratios = [layer["range"] / layer["std"] for layer in layers if layer["std"] > 0]
    if not ratios:
        raise ValueError(f"run {label!r} has no layer with a std above 0: there is no range / std to draw")
    return ratios


def _line(row: Mapping[str, Any]) -> str:
    """What rows of one line share, as its label."""
    parts = ["float" if row["weight_bits"] is None else row["method"]]
    parts += [row["granularity"].replace("_", " ")] if row["granularity"] else []
    parts += [f"A{row['act_bits']}"] if row["act_bits"] is not None else []
    return ", ".join([*parts, f"{row['range_loss']} range loss" if row["range_loss"] else "no range loss"])


def _bit_ticks(axes: Axes, bits: list[float]) -> None:
    if not bits:
        return
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in range(1, 33) if tick <= 4 or tick in (6, 8, 16, 32)]
    low, high = min(bits), max(bits)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low / 1.1, high * 1.1)


def _figure(width: float = 7.0) -> tuple[Figure, Axes]:
    # No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _legend(figure: Figure, handles: list[Any]) -> None:
    """Below the axes, where it hides no data."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)), frameon=False, fontsize=9)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)
