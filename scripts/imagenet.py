"""Trains an image classifier with the range loss, from scratch or from a trained one; quantizes, clusters, measures, saves.

    accelerate launch scripts/imagenet.py --config_name mobilenet_v1 --bf16 --streaming       # ImageNet-1k from the hub
    python scripts/imagenet.py --model_name_or_path DIR --train_file T.parquet --validation_file V.parquet
    python scripts/imagenet.py --config_name resnet-18 --data_dir DIR                 # DIR/train/CLASS/, DIR/validation/CLASS/

Defaults are the recipe of the range loss's paper (SGD with Nesterov momentum; rate and decay by architecture; strength 0.01,
alpha from 0.1). Its ablations: `--range_weight 0`, and heavy L2, ten times the decay: `--range_weight 0 --weight_decay 4e-4`.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed

import common
import data_files
import image_data
import interrupts
import tracks
import vision_models
from hf_r2 import R2Trainer, R2TrainingArguments
from images import BAD_IMAGES, BadData, Decoder

# What differs from TrainingArguments' own defaults where no flag says otherwise. The paper names neither batch nor epochs.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/imagenet", "num_train_epochs": 90, "per_device_train_batch_size": 128, "learning_rate": 0.4,
    "weight_decay": 4e-5, "optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_eval_batch_size": 128, "logging_steps": 100,
    "save_steps": 1000, "save_total_limit": 2, "dataloader_drop_last": True, "dataloader_num_workers": 4, "seed": 0,
    "remove_unused_columns": False, "accelerator_config": {"dispatch_batches": False},  # each process reads shards of its own
    "dataloader_pin_memory": torch.cuda.is_available(),  # on a CPU it only warns
}  # fmt: skip
RESNET: dict[str, Any] = {"learning_rate": 1.0, "weight_decay": 1e-4}
FINE_TUNING: dict[str, Any] = {"learning_rate": 0.003, "num_train_epochs": 3}  # ours
SHUFFLED = 10_000  # streamed images among which the next one is drawn


@dataclass
class ImageArguments(tracks.RecipeArguments):
    """What to train, on which images, and how they are cut."""

    config_name: str | None = field(
        default=None,
        metadata={"help": f"Train from scratch: {', '.join(vision_models.NEW)}, or a config (folder, hub id)."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this classifier: a folder or hub id."}
    )
    new_head: bool = field(default=False, metadata={"help": "With a head of its own for the classes of the data."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet with columns image and label."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The like for measuring; goes with train_file."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folders train and validation, in each a folder of images per class."}
    )
    dataset_name: str = field(
        default=image_data.HUB_DATA, metadata={"help": "Data set on the hub with parts train and validation."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the hub's files while training, keep none."})
    bad_images: str = field(
        default="refuse", metadata={"help": "What to do with images that do not decode.", "choices": list(BAD_IMAGES)}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels; default 224, for inception_v3 299."})
    crop_fraction: float = field(
        default=0.875, metadata={"help": "Measure on the middle, this share of the shorter side long."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images, drawn at random."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Measure on so many images, drawn at random."}
    )
    channels_last: bool = field(default=True, metadata={"help": "Lay tensors out with channels last while training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_counts(self, "max_train_samples", "max_eval_samples", "image_size")
        if (self.config_name is None) == (self.model_name_or_path is None):
            raise ValueError("give either config_name (from scratch) or model_name_or_path (fine-tuning)")
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("train_file and validation_file go together: give both or neither")
        if self.data_dir is not None and self.train_file is not None:
            raise ValueError("give data_dir or files, not both")
        if self.streaming and (self.data_dir or self.train_file):
            raise ValueError("streaming is for the hub: leave out data_dir and files")
        if self.bad_images not in BAD_IMAGES or not 0 < self.crop_fraction <= 1:
            raise ValueError(
                f"bad_images must be one of {', '.join(BAD_IMAGES)} and crop_fraction above 0 and at most 1, got "
                f"{self.bad_images!r} and {self.crop_fraction}"
            )

    def size(self) -> int:
        """Pixels of a side."""
        return self.image_size or vision_models.SIZES.get(self.config_name or "", 224)


def main() -> None:
    """Load, then the road of all tracks: train, quantize, cluster, measure, save, push."""
    args, training = tracks.parse(ImageArguments, R2TrainingArguments, DEFAULTS, "imagenet", __doc__, recipe)
    if (
        args.config_name in vision_models.NEW
        and vision_models.NEW[args.config_name][0] is vision_models.TimmWrapperConfig
    ):
        vision_models.need_timm(args.config_name)
    set_seed(training.seed)
    train, validation = load_data(args, training)
    model = load_model(args, train)
    classes = int(model.config.num_labels or 0)
    for data, part in ((train, "train"), (validation, "validation")):
        image_data.check_labels(data, classes, part, advice="; --new_head makes one that fits")
    bound_steps_(training, train)
    train, validation, decoders = prepared(args, train, validation, classes)
    processor = vision_models.processor(args.model_name_or_path, args.size())
    collator: Any = image_data.Collator(list(processor.image_mean), list(processor.image_std))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    track = tracks.Track(
        name="imagenet",
        task=task(args),
        auto=AutoModelForImageClassification,
        processor=processor,
        trainer=lambda net, options: R2Trainer(net, options, train_dataset=train, data_collator=collator),
        measure=lambda net: {"accuracy": common.accuracy(net, training, validation, collator)},
        batch=lambda: next(iter(DataLoader(validation, batch_size=8, collate_fn=collator))),
        notes=lambda: {"bad_images": {decode.source: int(decode.count) for decode in decoders}},
        usage=usage,
    )
    try:
        tracks.run(model, args, training, track)
    except BadData as error:
        raise SystemExit(one_line(error)) from error


def one_line(error: BadData) -> str:
    """What is wrong with the data; from a data loader's worker it comes behind a traceback."""
    return str(error).strip().splitlines()[-1].removeprefix("images.BadData: ")


def recipe(flags: Namespace) -> dict[str, Any]:
    """What the architecture that the flags name, or fine-tuning, changes in the defaults."""
    if flags.model_name_or_path is not None:
        return FINE_TUNING
    return RESNET if "resnet" in (flags.config_name or "") else {}


def load_data(args: ImageArguments, training: R2TrainingArguments) -> tuple[Any, Any]:
    """Images to train on and to measure on, undecoded; one process of several loads, the others read its cache."""
    with training.main_process_first(desc="loading the data"):
        if args.train_file and args.validation_file:
            found = [image_data.from_file(file) for file in (args.train_file, args.validation_file)]
        elif args.data_dir:
            found = [image_data.from_folder(args.data_dir, part) for part in ("train", "validation")]
        else:
            common.go_offline_if_hub_is_unreachable()
            stream = args.streaming
            found = [image_data.from_hub(args.dataset_name, p, streaming=stream) for p in ("train", "validation")]
        train: Any
        train, validation = (
            data.take(most)
            if isinstance(data, IterableDataset) and most
            else data_files.subset(data, most, training.seed)
            for data, most in zip(found, (args.max_train_samples, args.max_eval_samples), strict=True)
        )
        if isinstance(train, IterableDataset):
            train = train.shuffle(training.seed, buffer_size=SHUFFLED)
        return train, validation


def load_model(args: ImageArguments, train: Any) -> PreTrainedModel:
    """The classifier to go on from, or a new one for the classes of `train`."""
    names = image_data.class_names(train)
    if names is None and (args.config_name or args.new_head):
        if args.streaming:
            raise SystemExit("the streamed data do not name their classes: fine-tune a model whose head fits instead")
        names = image_data.numbered_classes(train, "train")
    if args.config_name is not None:
        return vision_models.new(args.config_name, list(names or []), args.size())
    return vision_models.load(str(args.model_name_or_path), names if args.new_head else None)


def bound_steps_(training: R2TrainingArguments, train: Any) -> None:
    """Streamed data have no length for Trainer: sets `max_steps` from the count that the hub states, or ends with one line."""
    if not isinstance(train, IterableDataset) or training.max_steps > 0:
        return
    split = (train.info.splits or {}).get("train")
    if split is None or not split.num_examples:
        raise SystemExit("the hub does not say how many images there are to stream: give --max_steps")
    images = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    training.max_steps = math.ceil(training.num_train_epochs * split.num_examples / images)


def prepared(args: ImageArguments, train: Any, validation: Any, classes: int) -> tuple[Any, Any, list[Decoder]]:
    """Both data sets as tensors, decoded as they are read; and the decoders, which count what does not decode."""
    decoders = [Decoder(part, args.bad_images) for part in ("train", "validation")]
    crops = [
        image_data.Crops(args.size(), decode, classes, train=training, crop_fraction=args.crop_fraction)
        for decode, training in zip(decoders, (True, False), strict=True)
    ]
    return crops[0].on(train), crops[1].on(validation), decoders


def task(args: ImageArguments) -> dict[str, str]:
    """What was measured on, for the card."""
    local = args.validation_file or args.data_dir
    name = Path(local).name if local else args.dataset_name
    return {"name": "Image classification", "dataset": name, "split": "validation", "metric": "accuracy"}


def usage(folder: Path) -> str:
    """What to type in Python."""
    lines = ["import hf_r2", "from transformers import pipeline"]
    return "\n".join([*lines, f'print(pipeline("image-classification", "{folder}")("photo.jpg"))'])


if __name__ == "__main__":
    interrupts.run(main)
