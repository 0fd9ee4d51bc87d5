"""Scores of any checkpoint, float or packed, on local data: what scripts/quantize.py and scripts/evaluation.py share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import common
import data_files
import image_data
import qnli_data
import translation_data
from images import Pictures

METRICS = {"image-classification": "accuracy", "text-classification": "accuracy", "translation": "bleu"}
AUTO: dict[str, Any] = {
    "image-classification": AutoModelForImageClassification,
    "text-classification": AutoModelForSequenceClassification,
    "translation": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Measured:
    """Batches of keyword arguments for `forward`, and the score of a model on all of them, by the metric's name."""

    batches: list[dict[str, Tensor]]
    score: Callable[[nn.Module], dict[str, Any]]
    samples: int
    bad_images: int = 0  # were left out because they do not decode


def load_model(args: Any) -> PreTrainedModel:
    """The checkpoint, float or packed, on the accelerator where there is one; ends with one line where it cannot be had."""
    model = common.load_model(AUTO[args.task], args.model_name_or_path).eval()
    return model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[arg-type]


def load_float(args: Any) -> PreTrainedModel:
    """The float checkpoint to be quantized; ends with one line for a quantized one."""
    model = load_model(args)
    if getattr(model, "is_quantized", False):
        raise SystemExit(
            f"--model_name_or_path {args.model_name_or_path} is quantized already: give the float model that it was made of "
            "(scripts/evaluation.py measures quantized ones)"
        )
    return model


def first(data: Dataset, most: int | None) -> Dataset:
    """The first `most` rows, or all of them."""
    return data if most is None else data.select(range(min(most, len(data))))


def load(
    args: Any, data: Dataset, model: PreTrainedModel, size: int, name: str, rows: Sequence[int] | None = None
) -> Measured:
    """Rows of the task in batches of `size`; texts are sorted by length.

    For calibration `rows` are given, their numbers in the file `name`: batches are a sample of the data, texts in their order,
    and labels are not looked at.

    Ends with one line for missing columns, labels that the head cannot give, empty texts, and images that do not decode.
    """
    if args.task == "image-classification":
        return _images(args, data, model, size, name, rows)
    if args.task == "translation":
        return _sentences(args, data, model, size, name)
    return _pairs(args, data, model, size, name, rows)


def _images(
    args: Any, data: Dataset, model: PreTrainedModel, size: int, name: str, rows: Sequence[int] | None
) -> Measured:
    labelled = rows is None
    columns = image_data.COLUMNS if labelled else image_data.COLUMNS[:1]
    data_files.need(columns, data.column_names, name)
    if labelled:
        image_data.check_labels(data, int(model.config.num_labels or 0), name)
    data = image_data.checked(data, name, columns)
    how = (args.image_size, args.model_name_or_path, name, args.bad_images, args.crop_fraction)
    found = Pictures(data, *how, rows=rows, labelled=labelled)
    batches = found.batches(size)
    score = lambda net: {"accuracy": accuracy(net, batches, found.labels)}  # noqa: E731
    return Measured(batches, score, len(found), found.bad_images)


def _pairs(
    args: Any, data: Dataset, model: PreTrainedModel, size: int, name: str, rows: Sequence[int] | None
) -> Measured:
    tokenizer, classes = common.load_tokenizer(args.model_name_or_path), model.config.num_labels
    if classes != len(qnli_data.LABELS):
        raise SystemExit(f"{name}: labels are {' and '.join(qnli_data.LABELS)}, but the head has {classes} classes")
    checked = qnli_data.checked(data, name, rows)
    texts = qnli_data.tokenized(checked, tokenizer, args.max_length, by_length=rows is None)
    labels = torch.tensor(texts["labels"] if rows is None else [])
    texts = texts.select_columns([column for column in texts.column_names if column != "labels"])
    batches = [dict(tokenizer.pad(texts[i : i + size], return_tensors="pt")) for i in range(0, len(texts), size)]
    return Measured(batches, lambda net: {"accuracy": accuracy(net, batches, labels)}, len(texts))


def _sentences(args: Any, data: Dataset, model: PreTrainedModel, size: int, name: str) -> Measured:
    import bleu  # needs sacrebleu, an extra

    tokenizer = common.load_tokenizer(args.model_name_or_path)
    pairs = translation_data.pairs(data, args.source_lang, args.target_lang, name)
    collate = translation_data.collator(tokenizer, model)
    rows = list(translation_data.tokenized(pairs, tokenizer, args.max_length, None))
    batches = [dict(collate(rows[i : i + size])) for i in range(0, len(rows), size)]
    for batch in batches:
        del batch["labels"]  # forward is for outputs here, not for a loss
    texts: Any = pairs.to_dict()

    def score(net: Any) -> dict[str, Any]:
        options = {"batch_size": size, "max_length": args.max_length, "num_beams": args.num_beams}
        return bleu.score(bleu.translations(net, tokenizer, texts["source"], **options), texts["target"])

    return Measured(batches, score, len(rows))


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[dict[str, Tensor]], labels: Tensor) -> float:
    """Top-1, 0 to 1."""
    device = next(model.parameters()).device
    model.eval()
    guesses = [model(**{k: v.to(device) for k, v in batch.items()}).logits.argmax(-1).cpu() for batch in batches]
    return float((torch.cat(guesses) == labels).float().mean())
