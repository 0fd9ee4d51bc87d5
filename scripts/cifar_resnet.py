"""Trains a small ResNet on CIFAR-10, in float or quantized or clustered; measures and saves it.

    python scripts/cifar_resnet.py --train_file train.parquet --validation_file test.parquet --output_dir runs/float
    python scripts/cifar_resnet.py --train_file train.parquet --validation_file test.parquet --output_dir runs/lsq \
      --model_name_or_path runs/float --method lsq --weight_bits 4 --act_bits 4 --learning_rate 0.01 --num_train_epochs 3

Parquet files with columns image and label. Every flag of R2TrainingArguments works too, `--range_loss` included (default:
none). The saved folder goes into scripts/quantize.py with the same `--image_size`.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification, set_seed

import common
import image_data
import interrupts
import vision_models
from hf_r2 import ENCODERS, R2QuantConfig, R2Trainer, R2TrainingArguments, convert, prepare
from hf_r2.model_card import write_card
from hf_r2.report import report
from images import BAD_IMAGES, Pictures

# What differs from TrainingArguments' own defaults where no flag says otherwise.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/cifar_resnet", "num_train_epochs": 12, "per_device_train_batch_size": 128, "learning_rate": 0.1,
    "optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "weight_decay": 5e-4, "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "save_strategy": "no", "logging_steps": 100, "report_to": "none",
    "range_loss": "none", "seed": 0, "dataloader_num_workers": 0, "dataloader_drop_last": True,
    "dataloader_pin_memory": torch.cuda.is_available(),  # on a CPU it only warns
}  # fmt: skip


@dataclass
class CifarArguments:
    """What to train on, and the network."""

    train_file: str = field(metadata={"help": "Parquet with columns image and label."})
    validation_file: str = field(metadata={"help": "The like for measuring."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many images."})
    image_size: int = field(
        default=64,
        metadata={"help": "Images are scaled up to so many pixels: the stem of transformers' ResNet strides 4 x."},
    )
    bad_images: str = field(
        default="refuse", metadata={"help": "What to do with images that do not decode.", "choices": list(BAD_IMAGES)}
    )
    crop_padding: int = field(default=8, metadata={"help": "Random crops move by up to so many pixels, and flip."})
    embedding_size: int = field(default=32, metadata={"help": "Channels of the stem."})
    hidden_sizes: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256], metadata={"help": "Channels of each stage."}
    )
    depths: list[int] = field(default_factory=lambda: [1, 1, 1, 1], metadata={"help": "Basic blocks of each stage."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder that this script saved, to go on from; default: a new network."}
    )
    method: str | None = field(
        default=None, metadata={"help": "Train quantized or clustered.", "choices": list(ENCODERS)}
    )
    weight_bits: int = field(default=4, metadata={"help": "Width of the weights, with a method."})
    act_bits: int | None = field(default=None, metadata={"help": "Width of the inputs of layers; default: float."})
    granularity: str = field(default="per_channel", metadata={"help": "per_channel or per_tensor."})
    options: str = field(default="{}", metadata={"help": 'Options of the method, as JSON: {"dim": 4}.'})

    def __post_init__(self) -> None:
        common.check_counts(self, "max_train_samples", "max_eval_samples", "image_size")
        if self.method is not None:
            self.recipe()  # what it refuses is to be known before any image is decoded

    def recipe(self) -> R2QuantConfig:
        """What the flags say about quantizing."""
        return R2QuantConfig(
            self.method or "",
            self.weight_bits,
            self.granularity,
            act_bits=self.act_bits,
            options=common.json_object(self.options, "options"),
        )


class CropAndFlip:
    """Collates rows of `Rows` into a training batch: random crops and flips of bytes, then normalized."""

    def __init__(self, pictures: Pictures, padding: int):
        self.pictures, self.padding = pictures, padding

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        """`pixel_values` [B, 3, H, W] and `labels` [B] of these images; draws from torch's global generator."""
        chosen, p = torch.tensor(rows), self.padding
        pixels = self.pictures.pixels[chosen]
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels, (p, p, p, p))
        tops, lefts = torch.randint(0, 2 * p + 1, (2, len(rows))).tolist()
        pixels = torch.stack([
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ])  # fmt: skip
        flips = (torch.rand(len(rows)) < 0.5).view(-1, 1, 1, 1)
        pixels = torch.where(flips, pixels.flip(-1), pixels)
        return {"pixel_values": self.pictures.normalized(pixels), "labels": self.pictures.labels[chosen]}


class Rows(torch.utils.data.Dataset):
    """Numbers of images: the collator cuts a whole batch at once, out of the images that are decoded already."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def build(args: CifarArguments, names: list[str]) -> ResNetForImageClassification:
    """The network to go on from, or an untrained ResNet of basic blocks whose first stage keeps the stem's resolution."""
    if args.model_name_or_path is not None:
        return common.load_model(ResNetForImageClassification, args.model_name_or_path)  # type: ignore[return-value]
    config = ResNetConfig(
        embedding_size=args.embedding_size, hidden_sizes=args.hidden_sizes, depths=args.depths, layer_type="basic",
        downsample_in_first_stage=False, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: Pictures, batch_size: int = 250) -> float:
    """Top-1 on all of `pictures`, 0 to 1."""
    device, hits = next(model.parameters()).device, 0
    for start in range(0, len(pictures), batch_size):
        batch = pictures.batch(start, batch_size)["pixel_values"].to(device)
        guesses = model.eval()(pixel_values=batch).logits.argmax(-1).cpu()
        hits += int((guesses == pictures.labels[start : start + batch_size]).sum())
    return hits / len(pictures)


def first(data: Dataset, most: int | None) -> Dataset:
    """The first `most` rows, or all of them."""
    return data if most is None else data.select(range(min(most, len(data))))


def results(model: nn.Module, args: CifarArguments, range_loss: str | None, top1: float) -> dict[str, Any]:
    """What a card says of the packed model, and its report."""
    row = common.packed_row(str(args.method), model, args.recipe(), {"accuracy": top1}, range_loss)
    name = Path(args.validation_file).name
    task = {"name": "Image classification", "dataset": name, "split": "validation", "metric": "accuracy"}
    said = {key: value for key, value in report(model).items() if key != "layers"}
    return {"task": task, "results": [row], "first_last": row["policy"], "report": said}


def main() -> None:
    """Decode once, train, measure, save the model and metrics.json."""
    parser = HfArgumentParser((CifarArguments, R2TrainingArguments), description=__doc__)  # type: ignore[arg-type]
    parser.set_defaults(**DEFAULTS)
    try:
        args, training = parser.parse_args_into_dataclasses()
    except (ValueError, TypeError) as error:
        raise SystemExit(f"cifar_resnet: {error}") from error
    out, start = Path(str(training.output_dir)), time.perf_counter()
    made = common.provenance({"cifar": asdict(args), "training": training.to_dict()}, training.seed)
    set_seed(training.seed)
    files = ((args.train_file, args.max_train_samples), (args.validation_file, args.max_eval_samples))
    data = [(first(image_data.from_file(file), most), file) for file, most in files]
    class_names = image_data.class_names(data[0][0]) or image_data.numbered_classes(*data[0])
    # Channels last: the convolutions of a CPU are about a fifth faster that way.
    model = build(args, class_names).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for rows, file in data:
        image_data.check_labels(rows, model.num_labels, file)
    train, validation = (Pictures(rows, args.image_size, str(out), file, args.bad_images) for rows, file in data)
    if args.method is not None:
        prepare(model, args.recipe())
    collator: Any = CropAndFlip(train, args.crop_padding)
    trainer = R2Trainer(model, training, train_dataset=Rows(len(train)), data_collator=collator)
    interrupts.train(trainer, training)
    try:
        save_and_measure(model, args, training, trainer, (train, validation), made, start)
    except KeyboardInterrupt as stop:
        interrupts.keep_trained(trainer)
        raise interrupts.Stopped(f"stopped; what is trained is in {out}: {interrupts.GO_ON}") from stop


def save_and_measure(
    model: Any, args: CifarArguments, training: Any, trainer: R2Trainer, pictures: tuple[Pictures, Pictures],
    made: dict[str, Any], start: float,
) -> None:  # fmt: skip
    """Packs the trained model if it is to be packed; writes it, its card and metrics.json."""
    out, (train, validation) = Path(str(training.output_dir)), pictures
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if args.method is not None:
        model = convert(copy.deepcopy(model))  # the trainer's stays as a checkpoint wants it
    model.save_pretrained(out)
    vision_models.square_processor(args.image_size).save_pretrained(out)
    top1 = accuracy(model, validation)
    measured = {"accuracy": top1, "train_accuracy": accuracy(model, train), "log": trainer.state.log_history}
    if args.method is not None:
        made |= results(model, args, None if trainer.range_loss is None else training.range_loss, top1)
        write_card(out, made)
    common.write_json(out / "metrics.json", {**made, **measured, "time_s": round(time.perf_counter() - start, 1)})
    print(f"{100 * top1:.2f} % on {len(validation)} images; the model is in {out}")


if __name__ == "__main__":
    interrupts.run(main)
