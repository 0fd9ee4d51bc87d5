"""Cells of the paper's tables: which steps give ours, where in their metrics.json it is, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import paper_numbers
from paper_numbers import AWARE
from steps import Step


@dataclass(frozen=True)
class Found:
    """Steps in the order to run; `key` names the row in the metrics.json of the last one."""

    steps: tuple[Step, ...]
    key: str


class Scale(Protocol):
    """How a column of a table is made, small or large; `cost` is the unit of its steps' minutes."""

    cost: str

    def stands_for(self, model: str) -> str | None:
        """Title of what is trained in the place of the paper's model; None where there is nothing."""
        ...

    def find(self, table: int, model: str, training: str, column: str) -> Found:
        """Steps and key of one cell."""
        ...


@dataclass(frozen=True)
class Cell:
    """One number of a table: the paper's, and where ours is; `found` is None where this scale has no such model."""

    model: str
    stand_in: str
    training: str
    column: str
    paper: float | None
    found: Found | None

    @property
    def steps(self) -> tuple[Step, ...]:
        """What has to be run for it."""
        return self.found.steps if self.found else ()

    def ours(self) -> float | None:
        """Percent or BLEU; None where it is not there (yet)."""
        return None if self.found is None else read(self.found.steps[-1].out, self.found.key)


def table(number: int, scale: Scale) -> list[Cell]:
    """All cells of a table; models that this scale can train also get a row of the size-aware form."""
    found = []
    numbers = paper_numbers.TABLES[number]
    for model in dict.fromkeys(model for model, _, _ in numbers):
        stand_in = scale.stands_for(model)
        trainings = list(dict.fromkeys(training for other, training, _ in numbers if other == model))
        columns = list(dict.fromkeys(column for other, _, column in numbers if other == model))
        for training in [*trainings, AWARE] if stand_in else trainings:
            for column in columns:
                made = scale.find(number, model, training, column) if stand_in else None
                paper = numbers.get((model, training, column))
                found.append(Cell(model, stand_in or "", training, column, paper, made))
    return found


def read(folder: Path, key: str) -> float | None:
    """The score named `key` in a metrics.json, in percent or BLEU: a row by its name, or METHOD-WIDTH-GRANULARITY."""
    file = folder / "metrics.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    if "accuracy" in content and (key == "accuracy" or "results" not in content):  # of a script that does one thing
        return 100 * content["accuracy"]
    for row in content.get("results", ()):
        if key in (row.get("name"), f"{row.get('method')}-{row.get('width')}-{row.get('granularity')}"):
            if "bleu" in row:
                return row["bleu"]
            return 100 * row["accuracy"] if "accuracy" in row else None
    return None


def markdown(cells: Iterable[Cell]) -> str:
    """Rows model and training, `ours (paper)` in each column."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in cells:
        rows.setdefault((cell.model, cell.stand_in, cell.training), {})[cell.column] = _text(cell)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| model | ours is | training | {' | '.join(columns)} |", "|---|---|---|" + "---|" * len(columns)]
    for (model, stand_in, training), row in rows.items():
        texts = " | ".join(row.get(column, "-") for column in columns)
        lines.append(f"| {model} | {stand_in or 'not at this scale'} | {training} | {texts} |")
    return "\n".join(lines)


def _text(cell: Cell) -> str:
    ours = cell.ours()
    shown = "-" if ours is None else f"{ours:.1f}"
    return shown if cell.paper is None else f"{shown} ({cell.paper:g})"
