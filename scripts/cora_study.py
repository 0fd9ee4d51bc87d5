"""CoRa beside what it starts from: a rounding, its adapters with equal and with searched ranks, and AdaRound.

    python scripts/cora_study.py --model_name_or_path FOLDER --calibration_file train.parquet --validation_file test.parquet \
      --widths 4 3 --bases squant --output_dir runs/cora

Images: parquet files with `image` and `label`. Writes metrics.json after every row (the same command goes on where it was
stopped), and three kinds of pictures: ranks, singular values with the cut-off, accuracy against bits. Beside seconds by the
clock there are seconds of computing, which other programs on the machine do not stretch as much.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, PreTrainedModel

import common
import interrupts
import measuring
import quantize as table_script
from hf_r2 import R2QuantConfig, quantize
from hf_r2.plots import plot_accuracy, plot_ranks, plot_singular_values
from hf_r2.report import report

SHOWN = 3  # layers whose singular values are drawn: those with the most ranks


@dataclass
class StudyArguments:
    """What to compare, and on what to measure it."""

    model_name_or_path: str = field(metadata={"help": "A trained image classifier: a folder, or a name on the Hub."})
    calibration_file: str = field(metadata={"help": "Local parquet; its labels are not used."})
    validation_file: str = field(metadata={"help": "Local parquet to measure on."})
    widths: list[int] = field(default_factory=lambda: [4, 3], metadata={"help": "Widths of the weights."})
    bases: list[str] = field(default_factory=lambda: ["squant"], metadata={"help": "Roundings below the adapters."})
    budget: float = field(default=0.05, metadata={"help": "Numbers in the adapters as a share of the weights."})
    adapter_bits: int = field(default=4, metadata={"help": "Width of the adapters: 2 to 8, or 16 for float16."})
    cora: str = field(default="{}", metadata={"help": 'JSON, more options of cora: {"iters": 100}.'})
    adaround: str | None = field(default=None, metadata={"help": "JSON, options of AdaRound, to run it too: {}."})
    calibration_samples: int = field(default=512, metadata={"help": "Calibrate on at most so many samples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on so many samples; default: all."})
    image_size: int = field(default=224, metadata={"help": "Images are cut to squares of so many pixels."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of calibration samples."})
    output_dir: str = field(default="runs/cora", metadata={"help": "Where metrics.json and the pictures go."})

    def __post_init__(self) -> None:
        common.check_counts(self, "calibration_samples", "max_eval_samples", "image_size")


def cells(args: StudyArguments) -> list[dict[str, Any]]:
    """Name, method, width and options of every row; raises ValueError or TypeError for what does not make a recipe."""
    found = []
    more = {"progress": False, "budget": args.budget, "adapter_bits": args.adapter_bits}
    more |= common.json_object(args.cora, "cora")
    for bits in args.widths:
        for base in args.bases:
            found.append({"name": base, "method": base, "weight_bits": bits, "options": {}})
            forms = {
                "biases only": {"ranks": "equal", "budget": 1e-9},
                "equal ranks": {"ranks": "equal"},
                "searched ranks": {},
            }
            for form, options in forms.items():
                row = {"name": f"{base}, {form}", "method": "cora", "weight_bits": bits}
                found.append({**row, "options": {"base": base, **more, **options}})
        if args.adaround is not None:
            options = {"progress": False, **common.json_object(args.adaround, "adaround")}
            found.append({"name": "adaround", "method": "adaround", "weight_bits": bits, "options": options})
    for cell in found:
        recipe(cell)
    return found


def recipe(cell: dict[str, Any], trace_file: Path | None = None) -> R2QuantConfig:
    """The recipe of a row; that of CoRa writes a trace where it is told a file."""
    options = cell["options"] | ({} if trace_file is None else {"trace_file": trace_file})
    return R2QuantConfig(cell["method"], cell["weight_bits"], symmetric=False, options=options)


def run(
    cell: dict[str, Any], model: PreTrainedModel, data: table_script.Data, folder: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Quantizes once and measures; the trace too where there is one."""
    file = folder / "trace.json" if cell["method"] == "cora" else None
    clock, computing = time.perf_counter(), time.process_time()
    packed = quantize(model, recipe(cell, file), data.calibration)
    row = {**cell, "time_s": time.perf_counter() - clock, "cpu_s": time.process_time() - computing}
    row |= data.validation.score(packed)
    row["bits_per_weight"] = report(packed)["bits_per_weight"]
    trace = None if file is None else json.loads(file.read_text())
    if trace is not None:
        row |= {"iterations": len(trace["losses"]), "seconds": trace["seconds"]}
        row["ranks"] = [layer["rank"] for layer in trace["layers"]]
    elif cell["method"] == "adaround":
        row["iterations"] = cell["options"].get("iters", 500) * len(report(packed)["layers"])
    return row, trace


def text(row: dict[str, Any]) -> str:
    """A row of the table."""
    steps = row.get("iterations", 0)
    return (
        f"| W{row['weight_bits']} | {row['name']} | {100 * row['accuracy']:.1f} | {row['bits_per_weight']:.2f} | "
        f"{row['time_s']:.0f} | {row['cpu_s']:.0f} | {steps} |"
    )


def draw(rows: list[dict[str, Any]], traces: dict[str, Any], float_row: dict[str, Any], folder: Path) -> None:
    """All pictures of what is there."""
    shared = {"act_bits": None, "granularity": "", "range_loss": None}
    plotted = [{**row, **shared, "method": row["name"]} for row in rows] + [{**float_row, **shared}]
    plot_accuracy(plotted, folder / "accuracy.png")
    for group in sorted({name.partition(", ")[0] for name in traces}):
        found = {k: v for k, v in traces.items() if k.startswith(f"{group}, ") and "biases" not in k}
        if any(trace["layers"] for trace in found.values()):
            plot_ranks(found, folder / f"ranks-{group}.png")
        searched = found.get(f"{group}, searched ranks", {"layers": []})
        for layer in sorted(searched["layers"], key=lambda layer: -layer["rank"])[:SHOWN]:
            plot_singular_values(layer, folder / f"values-{group}-{layer['name']}.png")


def main() -> None:
    """Goes through the rows that are missing, and prints the table."""
    try:
        (args,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
        wanted = cells(args)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"cora_study: {error}") from error
    common.go_offline_if_hub_is_unreachable()
    try:
        fill(args, wanted)
    except KeyboardInterrupt as stop:
        raise interrupts.Stopped(
            f"stopped; finished rows are in {args.output_dir}: the same command goes on"
        ) from stop


def fill(args: StudyArguments, wanted: list[dict[str, Any]]) -> None:
    """Makes the rows that are missing, draws them, and prints the table."""
    folder = Path(args.output_dir)
    file = folder / "metrics.json"
    shared = ("model_name_or_path", "calibration_file", "validation_file", "calibration_samples")
    shared += ("max_eval_samples", "image_size", "seed")
    basis = {key: getattr(args, key) for key in shared}
    content = json.loads(file.read_text()) if file.is_file() else {}
    rows = content.get("results", []) if content.get("basis") == basis else []
    traces = content.get("traces", {}) if rows else {}
    source = table_script.QuantizeArguments(**basis, calibration_batch=16)
    model = measuring.load_float(source)
    data = table_script.Data(source, model)
    score = data.validation.score(model)
    float_row = common.float_row("float", model, score, None)
    print(f"float: {100 * score['accuracy']:.2f} %", flush=True)
    head = {**common.provenance(asdict(args), args.seed), "basis": basis, "float": float_row}
    for cell in wanted:
        if any(table_script.same(row, cell) for row in rows):
            continue
        torch.manual_seed(args.seed)
        row, trace = run(cell, model, data, folder)
        rows.append(row)
        if trace is not None:
            traces[f"W{cell['weight_bits']} {cell['name']}"] = trace
        common.write_json(file, {**head, "results": rows, "traces": traces})
        print(text(row), flush=True)
    rows = [row for cell in wanted for row in rows if table_script.same(row, cell)]
    draw(rows, traces, float_row, folder)
    print(
        "| width | what | accuracy % | bits per weight | s | s of computing | iterations |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(text(row) for row in rows))


if __name__ == "__main__":
    interrupts.run(main)
