"""QNLI: fine-tune a classifier with the range loss, quantize it, cluster it, evaluate, save, and push.

`accelerate launch scripts/qnli.py` fine-tunes MobileBERT on GLUE QNLI from the hub; see `--help` for local files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    Stopwatch,
    arguments_of,
    command,
    evaluate_classifier,
    git_commit,
    range_summary,
    versions,
    write_json,
)
from datasets import Dataset, DatasetDict
from qnli_data import LABELS, load_pairs, vocabulary
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from hf_r2 import R2QuantConfig, R2Trainer, R2TrainingArguments, convert, prepare, quantize
from hf_r2.hub import push_folder
from hf_r2.model_card import write_card
from hf_r2.plots import plot_accuracy, plot_ranges, plot_weights
from hf_r2.report import report


@dataclass
class QnliArguments:
    """What to train on, and what to make of the trained model."""

    model_name_or_path: str = field(
        default="google/mobilebert-uncased", metadata={"help": "Folder or hub id of the model to fine-tune."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "parquet, csv, tsv or json with question, sentence, label."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    generated: bool = field(
        default=False, metadata={"help": "A small MobileBERT from scratch on a generated data set; needs no network."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens; longer ones are cut."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many (shuffled) pairs."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many pairs."})
    weight_bits: list[int] = field(
        default_factory=lambda: [8, 4, 3, 2], metadata={"help": "Widths for round-to-nearest."}
    )
    granularity: str = field(
        default="per_tensor",
        metadata={"help": "per_tensor or per_channel scales.", "choices": ["per_tensor", "per_channel"]},
    )
    dkm_bits: list[int] = field(default_factory=lambda: [2, 1], metadata={"help": "Widths to cluster at."})
    dkm_steps: int = field(
        default=0, metadata={"help": "Training steps through the clustering; 0: post-training k-means."}
    )
    dkm_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of those steps."})
    dkm_tau: float = field(
        default=0.1, metadata={"help": "Temperature of the clustering, in units of the weights' variance."}
    )


def load(args: QnliArguments, seed: int) -> tuple[PreTrainedModel, Any, DatasetDict]:
    """Model, tokenizer and tokenized data."""
    data = load_pairs(args.train_file, args.validation_file, args.generated, seed)
    if args.generated:
        model, tokenizer = small_mobilebert()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        labels = dict(enumerate(LABELS))
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path, num_labels=2, id2label=labels
        )
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {args.model_name_or_path} has no pad token; set one and save it there")
    data["train"] = data["train"].shuffle(seed=seed)

    def tokenize(rows: dict[str, list]) -> dict[str, Any]:
        return tokenizer(rows["question"], rows["sentence"], truncation=True, max_length=args.max_length)

    for split, most in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        rows = data[split].select(range(min(most or len(data[split]), len(data[split]))))
        data[split] = rows.map(tokenize, batched=True, remove_columns=[c for c in rows.column_names if c != "label"])
    return model, tokenizer, data


def small_mobilebert() -> tuple[PreTrainedModel, Any]:
    """An untrained MobileBERT of 4 layers, and a word tokenizer for the generated data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = MobileBertConfig(
        vocab_size=len(words), hidden_size=128, embedding_size=32, intra_bottleneck_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=128, true_hidden_size=64, max_position_embeddings=64,
        normalization_type="layer_norm", id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    return MobileBertForSequenceClassification(config), fast


def train(model: PreTrainedModel, training: R2TrainingArguments, data: DatasetDict, tokenizer: Any) -> R2Trainer:
    """Fine-tunes `model` in place; resumes where `--resume_from_checkpoint` says."""
    trainer = R2Trainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    resume = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    return trainer


def cluster(
    model: PreTrainedModel,
    bits: int,
    args: QnliArguments,
    training: R2TrainingArguments,
    data: DatasetDict,
    tokenizer: Any,
) -> PreTrainedModel:
    """A copy of `model` clustered into 2**bits values per weight: by k-means, or trained through DKM."""
    config = R2QuantConfig(method="dkm", weight_bits=bits, options={"tau": args.dkm_tau})
    if args.dkm_steps == 0:
        return quantize(model, config)
    prepared = prepare(copy.deepcopy(model), config)
    steps = copy.deepcopy(training)
    steps.max_steps, steps.learning_rate, steps.resume_from_checkpoint = args.dkm_steps, args.dkm_learning_rate, None
    steps.output_dir = str(Path(str(training.output_dir)) / f"dkm-{bits}bit-training")
    train(prepared, steps, data, tokenizer)
    return convert(prepared)


def row(
    name: str,
    method: str | None,
    bits: int | None,
    granularity: str | None,
    model: PreTrainedModel,
    accuracy: float,
    restricted: bool,
) -> dict[str, Any]:
    """One line of the results."""
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    sizes = {"bits_per_weight": 32.0, "size_bytes": float_bytes} if method is None else report(model)
    return {
        "name": name, "method": method, "weight_bits": bits, "act_bits": None, "granularity": granularity, "accuracy": accuracy,
        "bits_per_weight": sizes["bits_per_weight"], "size_bytes": sizes["size_bytes"], "range_loss": restricted,
        "policy": sizes.get("policy", "float"),
    }  # fmt: skip


def compress(
    model: PreTrainedModel, args: QnliArguments, training: R2TrainingArguments, data: DatasetDict, tokenizer: Any
) -> list[dict[str, Any]]:
    """Evaluates the float model, and quantizes, clusters, evaluates and saves it at every width asked for."""
    out, validation, restricted = (
        Path(str(training.output_dir)),
        data["validation"],
        training.range_weight > 0 and training.range_loss != "none",
    )
    accuracy = evaluate_classifier(model, validation, tokenizer, name="float")
    rows = [row("float", None, None, None, model, accuracy, restricted)]
    recipes = [("nearest", bits) for bits in args.weight_bits] + [("dkm", bits) for bits in args.dkm_bits]
    for method, bits in recipes:
        if method == "nearest":
            packed = quantize(model, R2QuantConfig(weight_bits=bits, granularity=args.granularity))
        else:
            packed = cluster(model, bits, args, training, data, tokenizer)
        name = f"{method}-{bits}bit"
        accuracy = evaluate_classifier(packed, validation, tokenizer, name=name)
        granularity = args.granularity if method == "nearest" else "per_tensor"
        rows.append(row(name, method, bits, granularity, packed, accuracy, restricted))
        packed.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return rows


def check_reload(folder: Path, validation: Dataset, tokenizer: Any) -> bool:
    """Whether the packed model in `folder`, loaded by plain `from_pretrained`, computes twice the same as saved."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = DataCollatorWithPadding(tokenizer)(
        [{k: v for k, v in validation[i].items() if k != "label"} for i in range(8)]
    )
    with torch.inference_mode():
        first = model(**batch).logits
        model.save_pretrained(folder)
        return torch.equal(first, AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits)


def draw(
    out: Path, before: PreTrainedModel, model: PreTrainedModel, rows: list[dict[str, Any]], ranges: dict[str, Any]
) -> None:
    """The three plots: a layer's weights, ranges per layer, accuracy against bits."""
    name = max(ranges["before"], key=lambda r: r["range_over_std"])["name"]
    weights = [m.get_submodule(name).weight.detach() for m in (before, model)]
    plot_weights(*weights, out / "weights.png", name)
    plot_ranges(ranges, out / "ranges.png")
    plot_accuracy(rows, out / "accuracy.png")


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text."""
    head = f"{'model':14s} {'bits/weight':>11s} {'MB':>7s} {'accuracy %':>10s}"
    lines = [
        f"{r['name']:14s} {r['bits_per_weight']:11.2f} {r['size_bytes'] / 1e6:7.2f} {100 * r['accuracy']:10.2f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Load, train, compress, write down, push."""
    args, training = HfArgumentParser((QnliArguments, R2TrainingArguments)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    out, clock = Path(str(training.output_dir)), Stopwatch()
    push, training.push_to_hub = training.push_to_hub, False  # pushed at the end, whole, in one commit per model
    set_seed(training.seed)
    model, tokenizer, data = load(args, training.seed)
    before = copy.deepcopy(model)
    trainer = train(model, training, data, tokenizer)
    if not trainer.is_world_process_zero():
        return
    ranges = {"before": range_summary(before), "after": range_summary(model)}
    rows = compress(model, args, training, data, tokenizer)
    metrics = {
        "arguments": arguments_of(args, training), "versions": versions(), "seed": training.seed, "commit": git_commit(),
        "command": command(), "time_s": clock.seconds(), "results": rows, "log": trainer.state.log_history, "ranges": ranges,
        "task": {"name": "text-classification", "dataset": "glue", "config": "qnli", "split": "validation", "metric": "accuracy"},
        "first_last": rows[-1]["policy"],
    }  # fmt: skip
    write_json(out / "metrics.json", metrics)
    draw(out, before, model, rows, ranges)
    folders = [out / r["name"] for r in rows[1:]]
    for folder in folders:
        write_card(folder, metrics, result=folder.name, base_model=None if args.generated else args.model_name_or_path)
        if push:
            print(push_folder(folder, f"{training.hub_model_id or out.name}-{folder.name}"))
    same = check_reload(folders[-1], data["validation"], tokenizer)
    print(table(rows))
    print(f"reloaded {folders[-1]}: logits {'equal' if same else 'DIFFER'}")
    print("next:\n  import hf_r2\n  from transformers import AutoModelForSequenceClassification")
    print(f"  model = AutoModelForSequenceClassification.from_pretrained({str(folders[-1])!r})")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
