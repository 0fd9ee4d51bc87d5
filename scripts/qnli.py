"""Trains MobileBERT on GLUE QNLI with the range loss, quantizes and clusters it, measures and saves every model.

accelerate launch scripts/qnli.py                                    # google/mobilebert-uncased on nyu-mll/glue
python scripts/qnli.py --generated                                   # small model, generated data, no hub
python scripts/qnli.py --model_name_or_path DIR --train_file T.parquet --validation_file V.parquet
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

import common
import qnli_data
from hf_r2 import R2QuantConfig, R2Trainer, R2TrainingArguments, RangeLoss, convert, prepare, quantize
from hf_r2.hub import push_folder
from hf_r2.layers import weight_layers
from hf_r2.metrics import Accuracy
from hf_r2.model_card import write_card
from hf_r2.plots import plot_accuracy, plot_ranges, plot_weights

BASE_MODEL = "google/mobilebert-uncased"
# What differs from TrainingArguments' own defaults where no flag says otherwise.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/qnli", "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128,
    "warmup_steps": 0.06, "logging_steps": 50, "save_total_limit": 2, "seed": 0,
    "dataloader_pin_memory": torch.cuda.is_available(),  # on a CPU it only warns
}  # fmt: skip
GENERATED_DEFAULTS: dict[str, Any] = {
    **DEFAULTS, "output_dir": "runs/demo", "per_device_train_batch_size": 64, "learning_rate": 2e-3,
    "num_train_epochs": 6, "dkm_steps": 100, "dkm_learning_rate": 1e-3, "max_length": 32,
}  # fmt: skip


@dataclass
class QnliArguments:
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
    weight_bits: list[int] = field(
        default_factory=lambda: [8, 4, 3, 2], metadata={"help": "Widths for rounding to nearest, 1 to 8 each."}
    )
    granularity: str = field(
        default="per_tensor",
        metadata={"help": "Scales for rounding to nearest.", "choices": ["per_tensor", "per_channel"]},
    )
    dkm_bits: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Widths for clustering, 1 to 8 each."}
    )
    dkm_steps: int = field(
        default=500, metadata={"help": "Training steps through the soft clusters; 0: k-means after training only."}
    )
    dkm_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of those steps."})
    dkm_tau: float | None = field(
        default=None,
        metadata={"help": "Temperature of the clustering, in units of each weight's variance; default: by its width."},
    )

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("train_file and validation_file go together: give both or neither")
        if self.generated and (self.train_file or self.model_name_or_path):
            raise ValueError("generated brings its own model and data: leave out model_name_or_path and the files")
        if self.dkm_steps < 0 or self.max_length < 8:
            raise ValueError(
                f"dkm_steps must be 0 or more and max_length 8 or more, got {self.dkm_steps}, {self.max_length}"
            )
        if not self.generated and self.model_name_or_path is None:
            self.model_name_or_path = BASE_MODEL

    def configs(self) -> dict[str, R2QuantConfig]:
        """Name and recipe of each packed model; ValueError for a width that is not allowed."""
        g = self.granularity
        nearest = {f"nearest-{b}bit": R2QuantConfig("nearest", b, granularity=g) for b in self.weight_bits}
        dkm = {"granularity": "per_tensor", "options": {"tau": self.dkm_tau}}
        return nearest | {f"dkm-{b}bit": R2QuantConfig("dkm", b, **dkm) for b in self.dkm_bits}


def main() -> None:
    """Load, fine-tune, then for each recipe: quantize or cluster, measure, save; write, push, check, print."""
    args, training = parse_arguments()
    configs = args.configs()
    out, start = Path(str(training.output_dir)), time.perf_counter()
    push, training.push_to_hub = training.push_to_hub, False  # Trainer would push checkpoints in commits of its own
    set_seed(training.seed)
    model, tokenizer = load_model(args)
    train, validation = load_data(args, training, tokenizer)
    collator = DataCollatorWithPadding(tokenizer)

    ranges = {"before training": RangeLoss(model).summary()}
    trainer = R2Trainer(model, training, train_dataset=train, data_collator=collator, processing_class=tokenizer)
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    ranges["after training"] = RangeLoss(model).summary()

    range_loss = training.range_loss if trainer.range_loss is not None else None
    accuracy = evaluate(model, training, validation, collator)
    rows = [common.float_row("float", model, accuracy, range_loss)]
    folders: dict[str, Path] = {}
    for name, config in configs.items():
        packed = make_packed(model, config, args, training, train, collator)
        accuracy = evaluate(packed, training, validation, collator)
        rows.append(common.packed_row(name, packed, config, accuracy, range_loss))
        folders[name] = out / name
        if training.process_index == 0:
            save(packed, tokenizer, folders[name])
            draw_weights(model, packed, folders[name] / "weights.png")
            check_reload(packed, folders[name], collator([validation[i] for i in range(min(8, len(validation)))]))

    if training.process_index == 0:
        save(model, tokenizer, out / "float")
        run = {"time_s": round(time.perf_counter() - start, 1), "ranges": ranges, "log": trainer.state.log_history}
        write_results(args, training, rows, run, folders)
        if push:
            push_all(training, folders)
        print_results(rows, folders)


def parse_arguments() -> tuple[QnliArguments, R2TrainingArguments]:
    """Both groups of flags, with this script's defaults; a value that is not allowed ends with one line."""
    parser = HfArgumentParser((QnliArguments, R2TrainingArguments), description=__doc__)  # type: ignore[arg-type]
    parser.set_defaults(**(GENERATED_DEFAULTS if "--generated" in sys.argv else DEFAULTS))
    try:
        args, training = parser.parse_args_into_dataclasses()
        args.configs()
    except (ValueError, TypeError) as error:
        raise SystemExit(f"qnli: {error}") from error
    return args, training


def load_model(args: QnliArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float model with two classes, and its tokenizer; ends with one line where they cannot be had."""
    if args.generated:
        tokenizer = qnli_data.generated_tokenizer(args.max_length)
        return qnli_data.small_mobilebert(len(tokenizer)), tokenizer
    name = str(args.model_name_or_path)
    if not Path(name).is_dir():
        common.go_offline_if_hub_is_unreachable()
    labels = dict(enumerate(qnli_data.LABELS))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(labels), id2label=labels, label2id={label: i for i, label in labels.items()}
        )
    except OSError as error:
        raise SystemExit(
            f"cannot load {name!r} from a folder, the hub or its cache: {str(error).splitlines()[0]}. Give a local "
            "folder with --model_name_or_path, and local data with --train_file and --validation_file; or --generated"
        ) from error
    if tokenizer.pad_token is None:
        raise SystemExit(f"the tokenizer of {name!r} has no pad token, which batches need: set one and save it there")
    return model.float(), tokenizer


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
        train = qnli_data.subset(data["train"], args.max_train_samples, training.seed)
        validation = qnli_data.subset(data["validation"], args.max_eval_samples, training.seed)
        return (
            qnli_data.tokenized(train, tokenizer, args.max_length, by_length=False),
            qnli_data.tokenized(validation, tokenizer, args.max_length, by_length=True),
        )


def count_hits(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy of the larger logit; references and predictions of all processes together."""
    classes = torch.as_tensor(prediction.predictions).argmax(-1)
    return Accuracy(keep_in_memory=True).compute(predictions=classes, references=prediction.label_ids)  # type: ignore[return-value]


def evaluate(
    model: nn.Module, training: R2TrainingArguments, data: Dataset, collator: DataCollatorWithPadding
) -> float:
    """Accuracy, 0 to 1. By the plain Trainer: a packed model has no float weight for a range loss."""
    trainer = Trainer(model, training, eval_dataset=data, data_collator=collator, compute_metrics=count_hits)
    return trainer.evaluate()["eval_accuracy"]


def make_packed(
    model: PreTrainedModel,
    config: R2QuantConfig,
    args: QnliArguments,
    training: R2TrainingArguments,
    train: Dataset,
    collator: DataCollatorWithPadding,
) -> PreTrainedModel:
    """A packed copy of `model`; clustering trains for `dkm_steps` steps, with the same range loss, before packing."""
    if config.method != "dkm" or args.dkm_steps == 0:
        return quantize(model, config)
    options = copy.copy(training)
    options.max_steps, options.learning_rate = args.dkm_steps, args.dkm_learning_rate
    options.save_strategy = "no"  # type: ignore[assignment]
    prepared = prepare(copy.deepcopy(model), config)
    R2Trainer(prepared, options, train_dataset=train, data_collator=collator).train()
    return convert(prepared)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer into one folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw_weights(model: nn.Module, packed: nn.Module, path: Path) -> None:
    """Plots the weights of the middle layer before and after."""
    layers = weight_layers(model)
    layer = layers[len(layers) // 2]
    plot_weights(layer.weight.detach(), packed.get_submodule(layer.name).weight.detach(), path, layer.name)  # type: ignore[union-attr,operator]


def check_reload(packed: PreTrainedModel, folder: Path, batch: dict[str, torch.Tensor]) -> None:
    """Loads the saved model as a user would, and compares logits to the bit."""
    if not common.same_logits(packed, AutoModelForSequenceClassification.from_pretrained(folder), batch):
        raise RuntimeError(f"the model reloaded from {folder} gives other logits than the one that was measured")


def write_results(
    args: QnliArguments,
    training: R2TrainingArguments,
    rows: list[dict[str, Any]],
    run: dict[str, Any],
    folders: dict[str, Path],
) -> None:
    """metrics.json, the plots, and a card with every packed model."""
    out = Path(str(training.output_dir))
    arguments = {"qnli": asdict(args), "training": training.to_dict()}
    metrics = {**common.provenance(arguments, training.seed), "task": task(args), "results": rows}
    common.write_json(out / "metrics.json", {**metrics, **run})
    plot_accuracy(rows, out / "accuracy.png")
    plot_ranges(run["ranges"], out / "ranges.png")
    policies = {row["name"]: row["policy"] for row in rows if row["name"] in folders}
    for name, folder in folders.items():
        write_card(folder, {**metrics, "first_last": policies[name]}, result=name, repo_id=repo_id(training, name))
        common.write_json(folder / "metrics.json", {**metrics, "first_last": policies[name]})


def task(args: QnliArguments) -> dict[str, str]:
    """What was measured on, for the card."""
    if args.generated:
        return {
            "name": "generated questions",
            "dataset": "generated pairs",
            "split": "validation",
            "metric": "accuracy",
        }
    if args.validation_file:
        return {
            "name": "QNLI",
            "dataset": Path(args.validation_file).name,
            "split": "validation",
            "metric": "accuracy",
        }
    dataset, config = qnli_data.HUB_DATA
    return {"name": "QNLI", "dataset": dataset, "config": config, "split": "validation", "metric": "accuracy"}


def repo_id(training: R2TrainingArguments, name: str) -> str:
    """Hub id of a packed model: `hub_model_id` (default: name of the output folder), and which model it is."""
    return f"{training.hub_model_id or Path(str(training.output_dir)).name}-{name}"


def push_all(training: R2TrainingArguments, folders: dict[str, Path]) -> None:
    """One commit per model: weights, card and tokenizer."""
    for name, folder in folders.items():
        url = push_folder(folder, repo_id(training, name), private=bool(training.hub_private_repo))
        print(f"pushed {name}: {url}")


def print_results(rows: list[dict[str, Any]], folders: dict[str, Path]) -> None:
    """The table, where things are, and what to type next."""
    print(f"\n{common.table(rows)}\n")
    if not folders:
        return
    folder = next(iter(folders.values()))
    out = folder.parent
    print(f"In {out}: metrics.json, accuracy.png, ranges.png, and {len(folders)} packed models, each with its card.")
    print("Each was loaded again from its folder and gave the same logits. To use one, type in Python:\n")
    print("import hf_r2")
    print("from transformers import pipeline")
    pair = '{"text": "when did they build the towers ?", "text_pair": "in the end , they built the towers in 1850 ."}'
    print(f'print(pipeline("text-classification", "{folder}")({pair}))\n')


if __name__ == "__main__":
    main()
