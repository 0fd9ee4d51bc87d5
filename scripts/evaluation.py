"""Measures one checkpoint, float or packed, on local data, and writes one row of metrics.json.

    python scripts/evaluation.py --model_name_or_path runs/qnli/dkm-2bit --task text-classification --validation_file V.parquet
    python scripts/evaluation.py --model_name_or_path runs/translation/float --task translation --validation_file test2016.jsonl

A row of the same name, data and settings is replaced; other rows of the file stay. The files are those of the training scripts.
(It is not called evaluate.py: scripts stand first on Python's path, and would hide the package `evaluate` from all of them.)
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, PreTrainedModel

import common
import data_files
import interrupts
import measuring
from hf_r2 import R2QuantConfig
from images import BAD_IMAGES


@dataclass
class EvaluateArguments:
    """Which checkpoint, on what."""

    model_name_or_path: str = field(metadata={"help": "A float or packed model: a folder, or a name on the Hub."})
    validation_file: str = field(metadata={"help": "Local parquet, csv, tsv or json to measure on."})
    task: str = field(
        default="image-classification",
        metadata={"help": "What the file holds.", "choices": list(measuring.METRICS)},
    )
    name: str | None = field(default=None, metadata={"help": "Name of the row; default: that of the model's folder."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Measure on the first so many; default: all."}
    )
    batch_size: int = field(default=50, metadata={"help": "Samples in a batch."})
    image_size: int = field(default=224, metadata={"help": "Images are cut to squares of so many pixels."})
    crop_fraction: float | None = field(
        default=None,
        metadata={"help": "Scale the shorter side to image_size over this before; default: cut as it is."},
    )
    bad_images: str = field(
        default="refuse", metadata={"help": "What to do with images that do not decode.", "choices": list(BAD_IMAGES)}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    source_lang: str = field(default="en", metadata={"help": "Language that is translated."})
    target_lang: str = field(default="de", metadata={"help": "Language of the translations."})
    num_beams: int = field(default=4, metadata={"help": "Beams of the search for a translation."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where metrics.json is, or will be."})

    def __post_init__(self) -> None:
        common.check_counts(self, "max_eval_samples", "batch_size", "image_size", "max_length", "num_beams")


def main() -> None:
    """Load, measure, add the row, print it."""
    try:
        (args,) = HfArgumentParser(EvaluateArguments, description=__doc__).parse_args_into_dataclasses()  # type: ignore[arg-type]
    except ValueError as error:
        raise SystemExit(f"evaluation: {error}") from error
    data = measuring.first(data_files.read(args.validation_file), args.max_eval_samples)
    model = measuring.load_model(args)
    measured = measuring.load(args, data, model, args.batch_size, args.validation_file)
    start = time.perf_counter()
    score = measured.score(model)
    found: dict[str, Any] = {"samples": measured.samples, "bad_images": measured.bad_images}
    found |= {"eval_s": round(time.perf_counter() - start, 2), "settings": settings(args)}
    found["made_by"] = common.provenance(asdict(args), 0)
    row_ = {**row(args.name or Path(args.model_name_or_path).name, model, score), **found}
    file = Path(args.output_dir) / "metrics.json"
    common.write_json(
        file, {"results": joined(json.loads(file.read_text())["results"] if file.is_file() else [], row_)}
    )
    print(common.table([row_], measuring.METRICS[args.task]))


def settings(args: EvaluateArguments) -> dict[str, Any]:
    """What the score depends on beside the model."""
    return {
        key: value for key, value in asdict(args).items() if key not in ("model_name_or_path", "name", "output_dir")
    }


def row(name: str, model: PreTrainedModel, score: dict[str, Any]) -> dict[str, Any]:
    """The row of a float or packed model; which range loss it was trained with a checkpoint does not say."""
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, R2QuantConfig):
        return common.packed_row(name, model, config, score, None)
    return common.float_row(name, model, score, None)


def joined(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` and the new one, in the place of one of the same name and settings."""
    same = [i for i, old in enumerate(rows) if (old["name"], old.get("settings")) == (new["name"], new["settings"])]
    return [*rows[: same[0]], new, *rows[same[0] + 1 :]] if same else [*rows, new]


if __name__ == "__main__":
    interrupts.run(main)
