"""Writes the model card of a packed model from the `metrics.json` of the run that made it; no number is typed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_r2.deployed import deployed_table

TEMPLATE = Path(__file__).with_name("card_template.md")
KEYS = ("arguments", "versions", "seed", "commit", "command", "task", "results", "first_last")
TASK_KEYS = ("name", "dataset", "split", "metric")
ROW_KEYS = ("name", "method", "weight_bits", "act_bits", "granularity", "bits_per_weight", "size_bytes", "range_loss")
FRACTIONS = ("accuracy", "f1")  # metrics given as 0 to 1 and shown in percent; others (BLEU) are shown as they are
TRAINING = (  # the arguments that decide the result, in the order of the card
    *("range_loss", "range_weight", "range_alpha", "range_trainable", "range_lr", "range_units", "range_target"),
    "range_decoupled",
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("weight_decay", "warmup_steps", "lr_scheduler_type", "max_train_samples", "max_eval_samples"),
)
# End of the architecture's name in config.json -> pipeline tag, auto class, class and name of what prepares its input.
ARCHITECTURES = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
    "ForConditionalGeneration": ("translation", "AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "MTModel": ("translation", "AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
}
DATA_FILE = re.compile(r"\.(parquet|csv|tsv|jsonl?|txt|arrow)$")
PICTURES = {
    "accuracy.png": "the metric over bits per weight",
    "ranges.png": "range / std",
    "weights.png": "weights of a layer",
}
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def write_card(
    folder: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    *,
    result: str | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    deployed: Mapping[str, Any] | None = None,
) -> Path:
    """Writes README.md into the folder of a saved model and returns its path; works offline.

    `metrics` is what the scripts write as metrics.json, with the keys `KEYS`, `TASK_KEYS` and `ROW_KEYS` above; `first_last`
    is a phrase on first and last layers, a row holds the metric under its own name (accuracy and f1 from 0 to 1), and
    `weight_bits` None stands for float. `result` names the row this folder holds (needed when there are several); it alone
    goes into the model index. Plots in the folder that are named as in `PICTURES` are shown. `repo_id` is the name to load
    by (default: that of the folder). `base_model` is the Hub id of the float model; by default `model_name_or_path` of the
    arguments where that is a Hub id and no local folder. `deployed`: metrics.json of scripts/bench_export.py, for a table of
    latency, size and accuracy.

    Raises ValueError that names what `metrics` lacks or what is not a number, and for an unknown `result`.
    """
    folder = Path(folder)
    rows, row = _check(metrics, result)
    task, arguments = metrics["task"], _flat(metrics["arguments"])
    repo_id = repo_id or folder.resolve().name
    base_model = base_model or _hub_id(arguments.get("model_name_or_path"))
    tag, auto_model, auto_processor = _architecture(folder)
    data = _front_matter(metrics, row, tag, repo_id, base_model, license, language)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        auto_model=auto_model,
        auto_processor=auto_processor,
        processor="tokenizer" if auto_processor == "AutoTokenizer" else "processor",
        task=task,
        metric=task["metric"],
        headline=_shown(row, task["metric"]),
        float_row=next((_shown(r, task["metric"]) for r in rows if r["weight_bits"] is None and r is not row), None),
        rows=[_shown(r, task["metric"], bold=r is row) for r in rows],
        training={key: arguments[key] for key in TRAINING if arguments.get(key) is not None},
        pictures={name: what for name, what in PICTURES.items() if (folder / name).is_file()},
        deployed=None if deployed is None else _deployed(deployed),
        versions=", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        **{key: metrics[key] for key in ("first_last", "seed", "commit", "command")},
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _front_matter(
    metrics: Mapping[str, Any],
    row: Mapping[str, Any],
    tag: str | None,
    repo_id: str,
    base_model: str | None,
    license: str | None,
    language: str | list[str] | None,
) -> ModelCardData:
    return ModelCardData(
        language=language,
        license=license,
        library_name="transformers",  # what loads it; with "hf_r2" here the Hub would show no widget and no snippet
        pipeline_tag=tag,
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        tags=["hf_r2", "quantized", f"{row['weight_bits']}-bit", *([row["method"]] if row["method"] else [])],
        datasets=_hub_id(metrics["task"]["dataset"]),
        metrics=[metrics["task"]["metric"]],
        model_name=repo_id.split("/")[-1],
        eval_results=[_eval_result(metrics["task"], row, tag)],
    )


def _deployed(bench: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a bench, and what it was measured on and by."""
    _require(bench, ("deployed", "head", "command"), "deployed")
    return {"table": deployed_table(bench["deployed"]), "head": bench["head"], "command": bench["command"]}


def _check(metrics: Mapping[str, Any], result: str | None) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """All rows, and the row of this model; ValueError for what is missing or not a number."""
    _require(metrics, KEYS, "metrics")
    _require(metrics["task"], TASK_KEYS, "metrics['task']")
    rows, metric = list(metrics["results"]), metrics["task"]["metric"]
    if not rows:
        raise ValueError("metrics['results'] is empty: a card needs at least one measured row")
    for index, row in enumerate(rows):
        where = f"metrics['results'][{index}]"
        _require(row, (*ROW_KEYS, metric), where)
        for key in (metric, "bits_per_weight", "size_bytes"):
            value = row[key]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{where}[{key!r}] must be a finite number, 0 or more, got {value!r}")
        if metric in FRACTIONS and row[metric] > 1:
            raise ValueError(f"{where}[{metric!r}] must be a fraction from 0 to 1, got {row[metric]!r}")
    names = [row["name"] for row in rows]
    if result is None and len(rows) > 1:
        raise ValueError(f"metrics['results'] has {len(rows)} rows: say result= which one this folder holds: {names}")
    if result is not None and names.count(result) != 1:
        raise ValueError(f"result must name one row of metrics['results'], got {result!r}; the rows are: {names}")
    row = rows[0] if result is None else rows[names.index(result)]
    if row["weight_bits"] is None:
        raise ValueError(
            f"row {row['name']!r} is the float model (weight_bits is None); cards are for quantized models"
        )
    return rows, row


def _require(given: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a dict with {', '.join(keys)}, got {type(given).__name__}")
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; a card needs {', '.join(keys)}")


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, also where a script groups them by dataclass."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def _hub_id(name: Any) -> str | None:
    """`name` where it can be an id on the Hub; None for a local folder or a data file."""
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or DATA_FILE.search(name) or Path(name).exists():
        return None
    return name


def _architecture(folder: Path) -> tuple[str | None, str, str]:
    """Pipeline tag, auto class and class of the tokenizer or image processor, by the architecture in config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: save the model there before writing its card")
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    known = (value for ending, value in ARCHITECTURES.items() if names[0].endswith(ending))
    return next(known, (None, "AutoModel", "AutoTokenizer"))


def _eval_result(task: Mapping[str, Any], row: Mapping[str, Any], tag: str | None) -> EvalResult:
    return EvalResult(
        task_type=tag or "other",
        task_name=task["name"],
        dataset_type=_hub_id(task["dataset"]) or "local",
        dataset_name=task["dataset"],
        dataset_config=task.get("config"),
        dataset_split=task["split"],
        metric_type=task["metric"],
        metric_value=row[task["metric"]],
    )


def _shown(row: Mapping[str, Any], metric: str, bold: bool = False) -> dict[str, str]:
    """A row as text: percent, kB or MB (powers of ten), W4A8."""
    name = str(row["name"]).replace("|", r"\|")
    widths = "float" if row["weight_bits"] is None else f"W{row['weight_bits']}"
    if row["act_bits"] is not None:
        widths += f"A{row['act_bits']}"
    granularity = (row["granularity"] or "-").replace("_", " ")
    method = row["method"] or "-"
    trained = f", trained with the {row['range_loss']} range loss" if row["range_loss"] else ""
    return {
        "label": f"**{name}**" if bold else name,
        "widths": widths,
        "method": method,
        "granularity": granularity,
        "range_loss": row["range_loss"] or "no",
        "score": f"{100 * row[metric]:.2f} %" if metric in FRACTIONS else f"{row[metric]:.2f}",
        "bits": f"{row['bits_per_weight']:.2f}",
        "size": _size(row["size_bytes"]),
        "recipe": f"{widths} by {method}" + (f", {granularity}" if row["granularity"] else "") + trained,
        "parameters": f"{row['parameters']:,}" if row.get("parameters") else "",
    }


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"
