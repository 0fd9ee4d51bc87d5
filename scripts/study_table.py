"""What the runs of the study gave: one row a form, means and spreads over seeds, as Markdown and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from proxies import PROXIES, folder_name

COLUMNS: dict[str, str] = {
    "float": "float",
    "raw range/std": "range/std",
    "deployed range/std": "deployed",
    "deployed kurtosis": "kurtosis",
    "nearest-W8A32-per_tensor": "W8 t",
    "nearest-W6A32-per_tensor": "W6 t",
    "nearest-W4A32-per_tensor": "W4 t",
    "nearest-W3A32-per_tensor": "W3 t",
    "nearest-W2A32-per_tensor": "W2 t",
    "nearest-W8A32-per_channel": "W8 c",
    "nearest-W6A32-per_channel": "W6 c",
    "nearest-W4A32-per_channel": "W4 c",
    "nearest-W3A32-per_channel": "W3 c",
    "nearest-W2A32-per_channel": "W2 c",
    "squant-W4A32-per_tensor": "SQuant W4 t",
    "squant-W2A32-per_tensor": "SQuant W2 t",
    "squant-W4A32-per_channel": "SQuant W4 c",
    "squant-W2A32-per_channel": "SQuant W2 c",
    "adaround-W4A32-per_channel": "AdaRound W4 c",
    "adaround-W2A32-per_channel": "AdaRound W2 c",
    "dfq-W6A32-per_tensor": "DFQ W6 t",
    "dfq-W4A32-per_tensor": "DFQ W4 t",
    "dkm-1bit": "DKM 1 bit",
    "dkm-2bit": "DKM 2 bits",
}  # fmt: skip  (key in the results: heading; t per tensor, c per channel; accuracies in percent)


def collect(folder: Path, proxy: str) -> list[dict[str, Any]]:
    """A row for each form that has at least one trained seed: `form`, `seeds`, mean of each column, and its spread."""
    rows = []
    for form in PROXIES[proxy].forms:
        found = [
            one for one in (_read(run) for run in sorted(folder.glob(f"{folder_name(form)}-[0-9]*"))) if "float" in one
        ]
        if found:
            rows.append({"form": form, "seeds": len(found), **_merged(found)})
    return rows


def _read(run: Path) -> dict[str, float]:
    """All figures of one run, by the keys of COLUMNS; those that are not there yet are left out."""
    found: dict[str, float] = {}
    content = _json(run / "train")
    results = {row["name"]: row["accuracy"] for row in content.get("results", [])}
    if "accuracy" in content:  # of a script that does one thing
        results["float"] = content["accuracy"]
    trained = "float" in results and any((run / "train").glob("**/config.json"))
    if not trained:
        return {}
    steps = _steps(content)
    found |= {name: 100 * value for name, value in results.items() if name == "float" or (steps and "dkm" in name)}
    for bits in (1, 2):
        clustered = _json(run / f"dkm-{bits}bit")
        if "accuracy" in clustered:
            found[f"dkm-{bits}bit"] = 100 * clustered["accuracy"]
    for method in ("nearest", "squant", "dfq", "adaround"):
        content = _json(run / method)
        if "float_accuracy" in content:  # on the very samples that the quantized models are measured on
            found["float"] = 100 * content["float_accuracy"]
        for target, shape in content.get("shapes", {}).items():
            found |= {f"{target} range/std": shape["range_over_std"], f"{target} kurtosis": shape["kurtosis"]}
        for row in content.get("results", []):
            if "accuracy" in row:
                found[f"{row['method']}-{row['width']}-{row['granularity']}"] = 100 * row["accuracy"]
    return found


def _steps(content: Mapping[str, Any]) -> int:
    """Training steps of the clusterings; 0 where they are k-means only, which the study does not show."""
    return max((part.get("dkm_steps", 0) for part in content["arguments"].values()), default=0)


def _json(folder: Path) -> dict[str, Any]:
    file = folder / "metrics.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _merged(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for key in COLUMNS:
        values = [one[key] for one in found if key in one]
        if values:
            merged[key] = mean(values)
        if len(values) > 1:
            merged[f"{key} spread"] = stdev(values)
    return merged


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a form; `81.2 ± 0.3` is a mean over seeds and their standard deviation."""
    rows = list(rows)
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [f"| form | seeds | {' | '.join(COLUMNS[key] for key in keys)} |", "|---|---|" + "---|" * len(keys)]
    for row in rows:
        lines.append(f"| {row['form']} | {row['seeds']} | {' | '.join(_text(row, key) for key in keys)} |")
    return "\n".join(lines)


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    spread = row.get(f"{key} spread")
    return f"{row[key]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy rounded to nearest over the width, a line for each form; per tensor left, per channel right."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, grid in zip(figure.subplots(1, 2, sharey=True), ("per_tensor", "per_channel"), strict=True):
        for number, row in enumerate(rows):
            points = [
                (b, row.get(f"nearest-W{b}A32-{grid}"), row.get(f"nearest-W{b}A32-{grid} spread", 0.0))
                for b in (2, 3, 4, 6, 8)
            ]
            points = [point for point in points if point[1] is not None]
            if points:
                bits, means, spreads = zip(*points, strict=True)
                look = "o-" if number < 10 else "s--"  # ten colours
                axes.errorbar(bits, means, spreads, label=row["form"], fmt=look, capsize=2)
        axes.set_title(f"rounded to nearest, {grid.replace('_', ' ')}")
        axes.set_xlabel("bits")
        axes.set_xticks([2, 3, 4, 6, 8])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)
