"""Trains MobileBERT on GLUE QNLI with the range loss, quantizes and clusters it, measures and saves every model.

accelerate launch scripts/qnli.py                                    # google/mobilebert-uncased on nyu-mll/glue
python scripts/qnli.py --generated                                   # small model, generated data, no hub
python scripts/qnli.py --model_name_or_path DIR --train_file T.parquet --validation_file V.parquet
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import common
import data_files
import interrupts
import qnli_data
import tracks
from hf_r2 import R2Trainer, R2TrainingArguments

BASE_MODEL = "google/mobilebert-uncased"
# What differs from TrainingArguments' own defaults where no flag says otherwise.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/qnli", "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128,
    "warmup_steps": 0.06, "logging_steps": 50, "save_total_limit": 2, "seed": 0,
    "dataloader_pin_memory": torch.cuda.is_available(),  # on a CPU it only warns
}  # fmt: skip
GENERATED: dict[str, Any] = {
    "output_dir": "runs/demo", "per_device_train_batch_size": 64, "learning_rate": 2e-3,
    "num_train_epochs": 6, "dkm_steps": 100, "dkm_learning_rate": 1e-3, "max_length": 32,
}  # fmt: skip


@dataclass
class QnliArguments(tracks.RecipeArguments):
    """What to train on, and which models to make of it."""

    model_name_or_path: str | None = field(default=None, metadata={"help": f"Folder or hub id; default {BASE_MODEL}."})
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet, csv, tsv or json with question, sentence, label; default GLUE QNLI."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The like for measuring; goes with train_file."}
    )
    generated: bool = field(
        default=False, metadata={"help": "A small model and generated data in place of all three: no hub, minutes."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on so many rows, drawn at random."})
    max_length: int = field(default=128, metadata={"help": "Cut pairs to so many tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_counts(self, "max_train_samples", "max_eval_samples")
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("train_file and validation_file go together: give both or neither")
        if self.generated and (self.train_file or self.model_name_or_path):
            raise ValueError("generated brings its own model and data: leave out model_name_or_path and the files")
        if self.max_length < 8:
            raise ValueError(f"max_length must be 8 or more, got {self.max_length}")
        if not self.generated and self.model_name_or_path is None:
            self.model_name_or_path = BASE_MODEL


def main() -> None:
    """Load, then the road of all tracks: fine-tune, quantize, cluster, measure, save, push."""
    args, training = tracks.parse(QnliArguments, R2TrainingArguments, DEFAULTS, "qnli", __doc__, recipe)
    set_seed(training.seed)
    model, tokenizer = load_model(args)
    train, validation = load_data(args, training, tokenizer)
    collator = DataCollatorWithPadding(tokenizer)
    track = tracks.Track(
        name="qnli",
        task=task(args),
        auto=AutoModelForSequenceClassification,
        processor=tokenizer,
        trainer=lambda net, options: R2Trainer(
            net, options, train_dataset=train, data_collator=collator, processing_class=tokenizer
        ),
        measure=lambda net: {"accuracy": common.accuracy(net, training, validation, collator)},
        batch=lambda: collator([validation[i] for i in range(min(8, len(validation)))]),
        usage=usage,
    )
    tracks.run(model, args, training, track)


def recipe(flags: Namespace) -> dict[str, Any]:
    """What generated data change in the defaults."""
    return GENERATED if flags.generated else {}


def load_model(args: QnliArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float model with two classes, and its tokenizer; ends with one line where they cannot be had."""
    if args.generated:
        tokenizer = qnli_data.generated_tokenizer(args.max_length)
        return qnli_data.small_mobilebert(len(tokenizer)), tokenizer
    name = str(args.model_name_or_path)
    labels = dict(enumerate(qnli_data.LABELS))
    numbers = {label: i for i, label in labels.items()}
    model = common.load_model(
        AutoModelForSequenceClassification, name, num_labels=2, id2label=labels, label2id=numbers
    )
    return model, common.load_tokenizer(name)


def load_data(
    args: QnliArguments, training: R2TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """Tokenized training and validation rows; one process of several does the work, the others read its cache."""
    with training.main_process_first(desc="loading the data"):
        if args.generated:
            data = qnli_data.generated_data()
        elif args.train_file and args.validation_file:
            data = qnli_data.from_files(args.train_file, args.validation_file)
        else:
            common.go_offline_if_hub_is_unreachable()
            data = qnli_data.from_hub()
        train = data_files.subset(data["train"], args.max_train_samples, training.seed)
        validation = data_files.subset(data["validation"], args.max_eval_samples, training.seed)
        return (
            qnli_data.tokenized(train, tokenizer, args.max_length, by_length=False),
            qnli_data.tokenized(validation, tokenizer, args.max_length, by_length=True),
        )


def task(args: QnliArguments) -> dict[str, str]:
    """What was measured on, for the card."""
    measured = {"split": "validation", "metric": "accuracy"}
    if args.generated:
        return {"name": "generated questions", "dataset": "generated pairs", **measured}
    if args.validation_file:
        return {"name": "QNLI", "dataset": Path(args.validation_file).name, **measured}
    dataset, config = qnli_data.HUB_DATA
    return {"name": "QNLI", "dataset": dataset, "config": config, **measured}


def usage(folder: Path) -> str:
    """What to type in Python."""
    pair = '{"text": "when did they build the towers ?", "text_pair": "in the end , they built the towers in 1850 ."}'
    lines = ["import hf_r2", "from transformers import pipeline"]
    return "\n".join([*lines, f'print(pipeline("text-classification", "{folder}")({pair}))'])


if __name__ == "__main__":
    interrupts.run(main)
