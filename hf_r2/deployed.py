"""Latency, size and accuracy of a model in several runtimes as a table for cards and READMEs; every number is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RUNTIMES = ("onnxruntime", "torch", "torch packed")
NO_HELP = 0.95  # a quantized model that takes so much of the float one's time is not helped


def deployed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what scripts/bench_export.py writes as `deployed`, and a line on what quantization slowed down.

    Each row: `model`, `width` ("float" once for each model, before its other rows), `latency_s` and `size_bytes` {runtime:
    number}, and, where it was measured, `accuracy` {runtime: 0 to 1}. In brackets: time over that of float in the same runtime.

    Raises ValueError for a row that lacks one of these, and for a model without a float row.
    """
    with_accuracy = any("accuracy" in row for row in rows)
    names = ["model", "onnxruntime ms", "torch, unpacked at load, ms", "torch, packed in memory, ms"]
    names += ["ONNX MB", "checkpoint MB", *(["onnxruntime accuracy %", "torch accuracy %"] if with_accuracy else [])]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    base: dict[str, Mapping[str, float]] = {}
    slow: dict[str, list[str]] = {}
    for row in rows:
        missing = [key for key in ("model", "width", "latency_s", "size_bytes") if key not in row]
        if missing:
            raise ValueError(f"a row of a bench's results lacks {', '.join(missing)}: take scripts/bench_export.py's")
        if row["width"] == "float":
            base[row["model"]] = row["latency_s"]
        elif row["model"] not in base:
            raise ValueError(f"there is no float row before {row['width']} of {row['model']}: ratios need one")
        lines.append("| " + " | ".join(_cells(row, base[row["model"]], with_accuracy)) + " |")
        _add_slow_(slow, row, base[row["model"]])
    said = "; ".join(f"{runtime}: {', '.join(found)}" for runtime, found in slow.items())
    return "\n".join(lines) + (f"\n\nNo faster than float: {said}." if said else "") + "\n"


def _cells(row: Mapping[str, Any], base: Mapping[str, float], with_accuracy: bool) -> list[str]:
    cells = [f"{row['model']} {row['width']}"]
    for runtime in RUNTIMES:
        seconds = row["latency_s"].get(runtime)
        ratio = "" if row["width"] == "float" or seconds is None else f" ({seconds / _float(base, runtime):.2f})"
        cells.append("" if seconds is None else f"{1e3 * seconds:.1f}{ratio}")
    cells += [f"{row['size_bytes'][runtime] / 1e6:.2f}" for runtime in ("onnxruntime", "torch")]
    if with_accuracy:
        found = row.get("accuracy", {})
        cells += [f"{100 * found[runtime]:.1f}" if runtime in found else "" for runtime in ("onnxruntime", "torch")]
    return cells


def _add_slow_(slow: dict[str, list[str]], row: Mapping[str, Any], base: Mapping[str, float]) -> None:
    """Adds a row to the list of each runtime in which it is not faster than float, in place."""
    for runtime, seconds in row["latency_s"].items() if row["width"] != "float" else ():
        ratio = seconds / _float(base, runtime)
        if ratio >= NO_HELP:
            slow.setdefault(runtime, []).append(f"{row['model']} {row['width']} ({ratio:.2f})")


def _float(base: Mapping[str, float], runtime: str) -> float:
    return base["torch" if runtime.startswith("torch") else runtime]
