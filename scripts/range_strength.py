"""How far each strength of the range loss moves the ranges of a MobileNet, and what that does to 8 and 6 bits.

Fine-tunes the same image classifier once for each setting on images from parquet files (columns image and label) and
prints float accuracy, range / std of raw and of deployed (batch norm folded) weights, and accuracy rounded to nearest per
tensor, raw and folded.

    python scripts/range_strength.py --model_name_or_path DIR --train_file T.parquet --validation_file V.parquet
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed

import common
import vision_models
from hf_r2 import R2QuantConfig, R2Trainer, R2TrainingArguments, RangeLoss, quantize
from hf_r2.graph.fold import fold_
from hf_r2.layers import following_batch_norms
from images import square

PAPER, SIZE_AWARE = (
    {"range_units": "absolute", "range_target": "raw"},
    {"range_units": "std", "range_target": "deployed"},
)


@dataclass
class StrengthArguments:
    """What to fine-tune, on what, for how long, and at which strengths."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of an image classifier with batch norms."})
    train_file: str = field(metadata={"help": "Parquet with columns image and label."})
    validation_file: str = field(metadata={"help": "The like for measuring."})
    paper_strengths: list[float] = field(
        default_factory=lambda: [0.01], metadata={"help": "Strengths of the paper's form."}
    )
    strengths: list[float] = field(
        default_factory=lambda: [0.01, 0.05, 0.2], metadata={"help": "Strengths of the size-aware, deployed form."}
    )
    alpha: float | None = field(default=3.0, metadata={"help": "Its temperature, in 1 / std."})
    max_steps: int = field(default=102, metadata={"help": "Training steps of each run."})
    batch_size: int = field(default=64, metadata={"help": "Images in a step."})
    learning_rate: float = field(default=0.003, metadata={"help": "Learning rate (SGD with momentum, cosine)."})
    size: int = field(default=160, metadata={"help": "Images are cut to squares of so many pixels."})
    max_eval_samples: int = field(default=1000, metadata={"help": "Measure on so many images."})
    seed: int = field(default=0, metadata={"help": "Seed of every run."})
    output_dir: str = field(default="runs/range_strength", metadata={"help": "Where metrics.json goes."})


class Images(torch.utils.data.Dataset):
    """Images decoded once, center-cropped, as bytes in memory; scaled to [-1, 1] as they are read."""

    def __init__(self, data: Dataset, size: int, name: str):
        self.pixels = torch.stack([square(image, size) for image in tqdm(data["image"], desc=f"decoding {name}")])
        self.labels = data["label"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index].float() / 127.5 - 1, "labels": self.labels[index]}


def folded(model: nn.Module) -> nn.Module:
    """A copy with every batch norm folded into the convolution before it."""
    model = copy.deepcopy(model).eval()
    names = {id(module): name for name, module in model.named_modules()}
    fold_(model, {conv: names[id(norm)] for conv, norm in following_batch_norms(model).items()})
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images, batch_size: int = 100) -> float:
    """Top-1 in per cent."""
    hits = 0
    for start in range(0, len(data), batch_size):
        batch = data.pixels[start : start + batch_size].float() / 127.5 - 1
        labels = torch.tensor(data.labels[start : start + batch_size])
        hits += int((model.eval()(pixel_values=batch).logits.argmax(-1) == labels).sum())
    return 100 * hits / len(data)


def run(
    name: str, args: StrengthArguments, options: dict[str, Any], train: Images, validation: Images
) -> dict[str, Any]:
    """Fine-tunes once, and measures."""
    set_seed(args.seed)
    model = vision_models.load(args.model_name_or_path)
    training = R2TrainingArguments(
        output_dir=args.output_dir, max_steps=args.max_steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate, optim="sgd", optim_args="momentum=0.9", lr_scheduler_type="cosine",
        weight_decay=4e-5, max_grad_norm=0.0, save_strategy="no", report_to="none", logging_steps=25, seed=args.seed, **options,
    )  # fmt: skip
    R2Trainer(model=model, args=training, train_dataset=train).train()
    row: dict[str, Any] = {"name": name, **options, "float": accuracy(model, validation)}
    for target, net in (("raw", model), ("folded", folded(model))):
        row[f"range_over_std_{target}"] = RangeLoss(net, "l_inf").mean_range_over_std().item()
        for bits in (8, 6):
            packed = quantize(net, R2QuantConfig(weight_bits=bits, granularity="per_tensor", options={"fold": False}))
            row[f"W{bits}_{target}"] = accuracy(packed, validation)
    return row


def main() -> None:
    """Decode once, train for each setting, print and write the table."""
    (args,) = HfArgumentParser(StrengthArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    files = {"train": args.train_file, "validation": args.validation_file}
    data = load_dataset("parquet", data_files=files)
    train = Images(data["train"], args.size, "train")
    validation = Images(
        data["validation"].select(range(min(args.max_eval_samples, len(data["validation"])))), args.size, "validation"
    )
    settings: dict[str, dict[str, Any]] = {"none": {"range_loss": "none"}}
    settings |= {f"paper {s}": {**PAPER, "range_weight": s} for s in args.paper_strengths}
    settings |= {
        f"size-aware {s}": {**SIZE_AWARE, "range_alpha": args.alpha, "range_weight": s} for s in args.strengths
    }
    rows: list[dict[str, Any]] = []
    for name, options in settings.items():
        rows.append(run(name, args, options, train, validation))
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        common.write_json(
            Path(args.output_dir) / "metrics.json", {**common.provenance(args.__dict__, args.seed), "results": rows}
        )


if __name__ == "__main__":
    main()
