"""The paper's figures, drawn from runs of ours: what outliers cost, weights with and without the loss, clusterings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoModelForImageClassification

import paper_numbers as paper
from cells import Cell, Found, read
from hf_r2.layers import weight_layers
from steps import Step

TRAININGS = (paper.BASELINE, paper.PAPER, paper.AWARE)
LAYERS = 5  # of figure 2
BITS = (2, 3, 4, 6, 8)  # of figure 1


@dataclass(frozen=True)
class Figured:
    """One figure: the steps it needs, and how it is drawn from them into a file. Both take a scale of scripts/scales.py."""

    steps: Callable[[Any], list[Step]]
    draw: Callable[[Any, Path], None]


def _steps(found: list[Found]) -> list[Step]:
    return [step for one in found for step in one.steps]


def _rounded(scale: Any) -> dict[str, Found]:
    return {training: scale.rounded(paper.R50, training) for training in TRAININGS}


def draw_benefit(scale: Any, path: Path) -> None:
    """Figure 1: the weights of one layer (left), accuracy rounded to nearest over the width (right)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for training, found in _rounded(scale).items():
        layers = _layers(scale.saved(paper.R50, training))
        _density(left, layers[len(layers) // 2], training)
        scores = [(b, read(found.steps[-1].out, f"nearest-W{b}A32-per_tensor")) for b in BITS]
        right.plot(
            *zip(*[(b, score) for b, score in scores if score is not None], strict=True), marker="o", label=training
        )
    left.set(xlabel="weight / std", yscale="log", title="weights of a middle layer")
    right.set(xlabel="bits, rounded to nearest per tensor", ylabel="accuracy %", xticks=BITS)
    right.legend()
    figure.savefig(path, dpi=150)


def _shapes(scale: Any) -> list[Found]:
    return [scale.find(1, paper.V1, training, "FP32") for training in (paper.HEAVY, *TRAININGS)]


def draw_weights(scale: Any, path: Path) -> None:
    """Figure 2: the weights of the first five 3 x 3 convolutions, plain, with heavy L2, with the range loss."""
    trainings = (paper.HEAVY, *TRAININGS)
    figure = Figure(figsize=(12, 2.4 * len(trainings)), layout="constrained")
    grid = figure.subplots(len(trainings), LAYERS, sharey=True)
    for line, training in zip(grid, trainings, strict=True):
        kernels = [w for w in _layers(scale.saved(paper.V1, training)) if w.shape[-2:] == (3, 3)]
        for number, (axes, weight) in enumerate(zip(line, kernels, strict=False)):
            _density(axes, weight, training)
            for end in (weight.min(), weight.max()):
                axes.plot(float(end / weight.std()), 1e-3, "ro", markersize=4)
            axes.set(yscale="log", title=f"convolution {number + 1}" if line is grid[0] else "")
        line[0].set_ylabel(training)
    figure.savefig(path, dpi=150)


def _clusterings(scale: Any) -> dict[tuple[str, str], Found]:
    return {(t, c): scale.clustering(paper.R18, t, c) for t in TRAININGS for c in paper.CLUSTERINGS}


def draw_clusterings(scale: Any, path: Path) -> None:
    """Figure 3: accuracy clustered by DKM, scalars and vectors, bars of each training."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    found = _clusterings(scale)
    for number, training in enumerate(TRAININGS):
        scores = [_score(found[training, column]) for column in paper.CLUSTERINGS]
        axes.bar([i + 0.27 * (number - 1) for i in range(len(scores))], scores, width=0.25, label=training)
    axes.set_xticks(range(len(paper.CLUSTERINGS)), paper.CLUSTERINGS)
    axes.set(ylabel="accuracy %", title=scale.stands_for(paper.R18))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _score(found: Found) -> float:
    score = read(found.steps[-1].out, found.key)
    return float("nan") if score is None else score


def plot_table(table: list[Cell], path: Path, title: str) -> None:
    """Ours over the paper's number, a point for each cell that has both."""
    both = [(cell, cell.ours()) for cell in table if cell.paper is not None]
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    for training in dict.fromkeys(cell.training for cell, _ in both):
        points = [(cell.paper, ours) for cell, ours in both if cell.training == training and ours is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), label=training)
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.set(xlabel="paper", ylabel="ours", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def _layers(folder: Path) -> list[torch.Tensor]:
    model = AutoModelForImageClassification.from_pretrained(folder)
    return [layer.weight.detach() for layer in weight_layers(model)]


def _density(axes: Axes, weight: torch.Tensor, label: str) -> None:
    values = (weight / weight.std()).flatten().numpy()
    axes.hist(values, bins=100, density=True, histtype="step", label=label)


FIGURES = {
    1: Figured(lambda scale: _steps(list(_rounded(scale).values())), draw_benefit),
    2: Figured(lambda scale: _steps(_shapes(scale)), draw_weights),
    3: Figured(lambda scale: _steps(list(_clusterings(scale).values())), draw_clusterings),
}
