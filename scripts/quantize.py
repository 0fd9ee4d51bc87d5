"""Post-training methods on a trained model: a table of methods, widths and granularities.

    python scripts/quantize.py --model_name_or_path FOLDER --calibration_file train.parquet --validation_file test.parquet \
      --methods nearest mse dfq squant adaround --widths W8A8 W4A8 --granularities per_channel per_tensor

Images: parquet files with `image` and `label`. Pairs of texts (`--task text-classification`): what scripts/qnli.py takes.
Sentences (`--task translation`): what scripts/translation.py takes. Every cell is written to metrics.json as it is done; the
same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
)

import common
import data_files
import interrupts
import measuring
from hf_r2 import ENCODERS, PTQ_METHODS, R2QuantConfig, RangeLoss, quantize
from hf_r2.model_card import FRACTIONS
from hf_r2.quant_config import STORAGES
from hf_r2.report import report
from images import BAD_IMAGES

WIDTH = re.compile(r"W([1-8])A([2-8]|32)")
RESUMABLE = ("adaround", "pdquant")  # they note each finished layer
UNFINISHED = "unfinished"  # folder of these notes


@dataclass
class QuantizeArguments:
    """What to quantize, how, and on what to measure it."""

    model_name_or_path: str = field(metadata={"help": "A trained model: a folder, or a name on the Hub."})
    calibration_file: str = field(metadata={"help": "Local parquet, csv, tsv or json; its labels are not used."})
    validation_file: str = field(metadata={"help": "The like to measure on."})
    task: str = field(
        default="image-classification",
        metadata={"help": "What the files hold.", "choices": list(measuring.METRICS)},
    )
    methods: list[str] = field(default_factory=lambda: ["nearest", "mse"], metadata={"help": "Post-training methods."})
    widths: list[str] = field(default_factory=lambda: ["W8A8", "W4A8"], metadata={"help": "W4A8, W4A32 and so on."})
    granularities: list[str] = field(
        default_factory=lambda: ["per_channel"], metadata={"help": "per_channel, per_tensor or both."}
    )
    options: str = field(default="{}", metadata={"help": 'JSON, options by method: {"adaround": {"iters": 500}}.'})
    symmetric: bool = field(default=False, metadata={"help": "Weights on grids around zero (requant always is)."})
    first_last_bits: int | None = field(
        default=None, metadata={"help": "Width of first and last layer; default: as the rest."}
    )
    calibration_samples: int = field(default=1024, metadata={"help": "Calibrate on at most so many samples."})
    calibration_batch: int = field(default=32, metadata={"help": "Samples in a calibration batch."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on so many samples; default: all."})
    batch_size: int = field(default=50, metadata={"help": "Samples in a batch while measuring."})
    image_size: int = field(default=224, metadata={"help": "Images are cut to squares of so many pixels."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    crop_fraction: float | None = field(
        default=None,
        metadata={"help": "Scale the shorter side to image_size over this before; default: cut as it is."},
    )
    bad_images: str = field(
        default="refuse", metadata={"help": "What to do with images that do not decode.", "choices": list(BAD_IMAGES)}
    )
    source_lang: str = field(default="en", metadata={"help": "Language that is translated."})
    target_lang: str = field(default="de", metadata={"help": "Language of the translations."})
    num_beams: int = field(default=4, metadata={"help": "Beams of the search for a translation."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of calibration samples, and of the methods."})
    storage: str = field(
        default="packed", metadata={"help": "How weights are stored, 'entropy': coded.", "choices": list(STORAGES)}
    )
    save_dir: str | None = field(
        default=None,
        metadata={"help": "Packed models go into its folders METHOD-WIDTH-GRANULARITY; cells measured before do not."},
    )
    output_dir: str = field(default="runs/quantize", metadata={"help": "Where metrics.json goes."})

    def __post_init__(self) -> None:
        common.check_counts(
            self,
            "calibration_samples",
            "calibration_batch",
            "max_eval_samples",
            "batch_size",
            "image_size",
            "max_length",
            "num_beams",
        )


class Data:
    """Calibration batches, and what models are measured on."""

    def __init__(self, args: QuantizeArguments, model: PreTrainedModel):
        file = args.calibration_file
        drawn, rows = data_files.drawn(data_files.read(file), args.calibration_samples, args.seed)
        calibration = measuring.load(args, drawn, model, args.calibration_batch, file, rows)
        self.calibration = calibration.batches
        measured = measuring.first(data_files.read(args.validation_file), args.max_eval_samples)
        self.validation = measuring.load(args, measured, model, args.batch_size, args.validation_file)
        self.bad_images = {"calibration": calibration.bad_images, "validation": self.validation.bad_images}
        for part, flag in ((calibration, "calibration_samples"), (self.validation, "max_eval_samples")):
            if part.samples < (getattr(args, flag) or 0):
                print(f"{part.samples} samples, fewer than the {getattr(args, flag)} of --{flag}", flush=True)


def cells(args: QuantizeArguments) -> list[dict[str, Any]]:
    """One dict of settings for each cell of the table.

    Raises ValueError or TypeError for whatever does not make a recipe: a width, a method, an option of it.
    """
    options, found = options_by_method(args.options), []
    for granularity in args.granularities:
        for method in args.methods:
            for width in args.widths:
                match = WIDTH.fullmatch(width)
                if match is None:
                    raise ValueError(f"widths are written W4A8 or W4A32 (W1 to W8, A2 to A8 or A32), got {width!r}")
                act_bits = None if match[2] == "32" else int(match[2])
                cell = {
                    "method": method, "width": width, "weight_bits": int(match[1]), "act_bits": act_bits,
                    "granularity": granularity, "symmetric": args.symmetric or method == "requant",
                    "options": options.get(method, {}), "first_last_bits": args.first_last_bits,
                    "storage": None if args.storage == "packed" else args.storage,  # as in files of before there was a choice
                }  # fmt: skip
                recipe(cell)
                found.append(cell)
    return found


def options_by_method(text: str) -> dict[str, Any]:
    """What --options says; raises ValueError for a method that there is not."""
    options, known = common.json_object(text, "options"), [*PTQ_METHODS, *ENCODERS]
    for method, own in options.items():
        if method not in known:
            raise ValueError(f"options are by method: there is no {method!r}; there are: {', '.join(known)}")
        if not isinstance(own, dict):
            raise ValueError(f'options of {method!r} must be a JSON object, like {{"name": 1}}, got {own!r}')
    return options


def recipe(cell: dict[str, Any], resume_dir: Path | None = None) -> R2QuantConfig:
    """The recipe of a cell; methods that can go on where they were stopped do so by what is in `resume_dir`."""
    keys = ("method", "weight_bits", "act_bits", "granularity", "symmetric", "options", "first_last_bits")
    settings: dict[str, Any] = {key: cell[key] for key in keys} | {"storage": cell.get("storage") or "packed"}
    if resume_dir is not None:
        settings["options"] = {"resume_dir": str(resume_dir), **settings["options"]}
    return R2QuantConfig(**settings)


def unfinished(cell: dict[str, Any], args: QuantizeArguments) -> Path | None:
    """Where a cell of a slow method keeps its layers until it is done, one folder for each cell, model and data."""
    if cell["method"] not in RESUMABLE:
        return None
    about = zlib.crc32(json.dumps([cell, basis(args)], sort_keys=True).encode())
    return Path(args.output_dir) / UNFINISHED / f"{name(cell)}-{about:08x}"


def name(cell: dict[str, Any]) -> str:
    """What the folders of a cell are called."""
    return f"{cell['method']}-{cell['width']}-{cell['granularity']}"


def run(
    cell: dict[str, Any],
    model: PreTrainedModel,
    data: Data,
    save_dir: str | None = None,
    resume_dir: Path | None = None,
) -> dict[str, Any]:
    """Quantizes once, measures, and saves if asked; a cell that the library refuses keeps its message."""
    resumed = {"resumed": True} if resume_dir is not None and any(resume_dir.glob("*")) else {}
    start = time.perf_counter()
    try:
        packed = quantize(model, recipe(cell, resume_dir), data.calibration)
    except ValueError as error:
        return {**cell, "error": str(error)}
    seconds = time.perf_counter() - start
    said, start = report(packed), time.perf_counter()
    measured = {**data.validation.score(packed), "time_s": seconds}
    measured |= {"eval_s": time.perf_counter() - start, "bad_images": data.bad_images}
    if save_dir is not None:
        packed.save_pretrained(Path(save_dir) / name(cell))
    return {
        **cell,
        **measured,
        **resumed,  # time_s is then that of the rest
        **{key: said[key] for key in ("bits_per_weight", "compression", "entropy", "policy", "notes")},
    }


def shapes(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Mean range / std and mean kurtosis of the weights (those that are not constant), raw and as deployed."""
    found = {}
    for target in ("raw", "deployed"):
        rows = [row for row in RangeLoss(model, "l_inf", target=target).summary() if row["std"]]
        found[target] = {key: mean(row[key] for row in rows) for key in ("range_over_std", "kurtosis")} if rows else {}
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a finished cell is the one asked for."""
    return all(json.dumps(one.get(key)) == json.dumps(value) for key, value in other.items())


def basis(args: QuantizeArguments) -> dict[str, Any]:
    """What every cell depends on."""
    free = ("methods", "widths", "granularities", "options", "storage", "save_dir")
    return {k: v for k, v in asdict(args).items() if k not in free}


def measured_before(content: dict[str, Any], args: QuantizeArguments) -> list[dict[str, Any]]:
    """The cells of an earlier run, if the model, the data and the seed were the same."""
    return content.get("results", []) if content.get("basis") == basis(args) else []


def table(rows: list[dict[str, Any]], granularity: str) -> str:
    """Methods by widths: accuracy in percent or BLEU; in brackets seconds taken, bits per weight, float16 over size."""
    rows = [row for row in rows if row["granularity"] == granularity]
    widths = list(dict.fromkeys(row["width"] for row in rows))
    lines = [f"| {granularity} | {' | '.join(widths)} |", "|---|" + "---|" * len(widths)]
    for name in dict.fromkeys(row["method"] for row in rows):
        found = {row["width"]: row for row in rows if row["method"] == name}
        texts = [text(found.get(width)) for width in widths]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def text(row: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if row is None or "error" in row:
        return "-" if row is None else "refused"
    metric = "bleu" if "bleu" in row else "accuracy"
    smaller = f", {row['compression']:.1f}x" if "compression" in row else ""
    score = shown(row[metric], metric).removesuffix(" %")
    more = "over " if row.get("resumed") else ""
    return f"{score} ({more}{row['time_s']:.0f} s, {row['bits_per_weight']:.2f} b{smaller})"


def shown(score: float, metric: str) -> str:
    """A fraction in percent, BLEU as it is."""
    return f"{100 * score:.1f} %" if metric in FRACTIONS else f"{score:.1f}"


def main() -> None:
    """Decode once, go through the cells that are missing, print the tables."""
    try:
        (args,) = HfArgumentParser(QuantizeArguments, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
        wanted = cells(args)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"quantize: {error}") from error
    common.go_offline_if_hub_is_unreachable()
    file = Path(args.output_dir) / "metrics.json"
    try:
        fill(args, wanted, file)
    except KeyboardInterrupt as stop:
        kept = f"finished cells are in {file}, finished layers of slow methods in {file.parent / UNFINISHED}"
        raise interrupts.Stopped(f"stopped; {kept}: the same command goes on") from stop


def fill(args: QuantizeArguments, wanted: list[dict[str, Any]], file: Path) -> None:
    """Makes the cells that `file` lacks, and prints the tables."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    model = measuring.load_float(args)
    data = Data(args, model)
    rows = measured_before(content, args)
    head = {**common.provenance(asdict(args), args.seed), "basis": basis(args)}
    metric = measuring.METRICS[args.task]
    score = data.validation.score(model)[metric]
    head |= {f"float_{metric}": score, "shapes": shapes(model)}
    print(f"float: {shown(score, metric)}", flush=True)
    for cell in tqdm(wanted, desc="cells"):
        if any(same(row, cell) for row in rows):
            continue
        torch.manual_seed(args.seed)
        notes = unfinished(cell, args)
        rows.append(run(cell, model, data, args.save_dir, notes))
        tqdm.write(
            f"{cell['method']} {cell['width']} {cell['granularity']}: {rows[-1].get('error') or text(rows[-1])}"
        )
        common.write_json(file, {**head, "results": rows})
        if notes is not None:
            shutil.rmtree(notes, ignore_errors=True)
    shutil.rmtree(file.parent / UNFINISHED, ignore_errors=True)  # what stopped runs with other flags have left
    kept = [row for row in rows if any(same(row, cell) for cell in wanted)]
    for granularity in args.granularities:
        print("\n" + table(kept, granularity))


if __name__ == "__main__":
    interrupts.run(main)
