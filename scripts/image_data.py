"""Labelled images for `scripts/imagenet.py`: from the hub (streamed or not), folders or parquet; crops on PIL and torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets import Image as ImageColumn
from torch import Tensor

import data_files
from images import BadData, Decoder, middle, square

HUB_DATA = "ILSVRC/imagenet-1k"
COLUMNS = ("image", "label")
LOCAL = "Give local data: --train_file and --validation_file (parquet), or --data_dir (folders train and validation)"
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the image, as Inception's and torchvision's random crops draw


def from_hub(name: str, part: str, *, streaming: bool) -> Any:
    """A split of a data set on the hub, or in the cache; ends with one line where neither has it, or gives no access."""
    try:
        return checked(load_dataset(name, split=part, streaming=streaming), f"{part} of {name}")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"cannot get {part} of {name} from the hub or its cache ({reason}). {LOCAL}") from error


def from_folder(folder: str, part: str) -> Dataset:
    """Images in FOLDER/`part`/CLASS/; ends with one line where there are none."""
    try:
        found: Any = load_dataset("imagefolder", data_dir=folder)
    except Exception as error:  # of a dozen kinds; the cause is what tells
        raise SystemExit(f"{folder}: cannot be read as folders of images ({error.__cause__ or error})") from error
    if part not in found:
        raise SystemExit(f"{folder}: no folder {part}; needed are train and validation, found {', '.join(found)}")
    return checked(found[part], f"{folder}/{part}")


def from_file(file: str) -> Dataset:
    """Images of a parquet file; ends with one line for a file that cannot be used."""
    return checked(data_files.read(file), file)


def checked(data: Any, source: str, columns: tuple[str, ...] = COLUMNS) -> Any:
    """`image`, left undecoded, and `label`; ends with one line where a column is missing or holds no images."""
    data_files.need(columns, data.column_names or list(data.features or {}), source)
    if not isinstance(data.features["image"], (ImageColumn, dict)):
        raise SystemExit(f"{source}: column image must hold images, got {data.features['image']}")
    return data.select_columns(list(columns)).cast_column("image", ImageColumn(decode=False))


def class_names(data: Any) -> list[str] | None:
    """Names of the classes where the data say them."""
    return getattr(data.features["label"], "names", None)


def numbered_classes(data: Dataset, source: str) -> list[str]:
    """Names for the classes of data that do not name theirs; ends with one line for labels that are no whole numbers."""
    labels = data.unique("label")
    wrong = [label for label in labels if not isinstance(label, int) or label < 0]
    if wrong:
        shown = ", ".join(map(repr, sorted(wrong, key=str)[:5]))
        raise SystemExit(f"{source}: labels must be whole numbers from 0 on, found {shown}")
    return [str(number) for number in range(1 + max(labels))]


def check_labels(data: Any, classes: int, source: str, advice: str = "") -> None:
    """Ends with one line for labels that a head of `classes` outputs cannot give; streamed labels show while training."""
    names = class_names(data)
    if names is not None and len(names) > classes:
        raise SystemExit(f"{source}: {len(names)} classes, but the head has {classes}{advice}")
    if isinstance(data, Dataset):
        try:
            _check_numbers(data.unique("label"), classes, source)
        except BadData as error:
            raise SystemExit(str(error)) from error


def _check_numbers(labels: list[Any], classes: int, source: str) -> None:
    wrong = [label for label in labels if not (isinstance(label, int) and 0 <= label < classes)]
    if wrong:
        shown = ", ".join(map(repr, sorted(set(wrong), key=str)[:5]))
        raise SystemExit(
            f"{source}: labels must be whole numbers from 0 to {classes - 1} for this head, found {shown}"
        )


class Crops:
    """Turns rows of undecoded images into tensors: `pixels` uint8 [3, size, size] and `labels`, without those that are skipped.

    Training crops are drawn from torch's generator (a piece of random area and shape, flipped half the time); others are
    the middle of the image, whose shorter side is scaled to `size` / `crop_fraction` before.
    """

    def __init__(self, size: int, decode: Decoder, classes: int, *, train: bool, crop_fraction: float = 0.875):
        self.size, self.decode, self.classes, self.train = size, decode, classes, train
        self.shorter = round(size / crop_fraction)

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows as columns, in and out. Raises BadData for labels that do not fit the head, and images that do not decode."""
        _check_numbers(rows["label"], self.classes, self.decode.source)
        pixels, labels = [], []
        for image, label in zip(rows["image"], rows["label"], strict=True):
            image = self.decode(image, f"an image of class {label}")
            if image is not None:
                pixels.append(random_crop(image, self.size) if self.train else middle(image, self.size, self.shorter))
                labels.append(label)
        return {"pixels": pixels, "labels": labels}

    def on(self, data: Any) -> Any:
        """`data` as a torch data set that gives such rows, as they are read."""
        if isinstance(data, IterableDataset):
            return data.map(self, batched=True, batch_size=16, remove_columns=list(COLUMNS))
        return data.with_transform(self)


def random_crop(image: Any, size: int) -> Tensor:
    """A random piece of a PIL image, scaled to uint8 [3, size, size], flipped half the time; draws from torch's generator."""
    box = next((box for box in _boxes(image.width, image.height)), (0, 0, image.width, image.height))
    pixels = square(image.resize((size, size), resample=2, box=box), size)
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


def _boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of random area and aspect ratio that fit: at most ten are tried."""
    low, high = map(math.log, CROP_RATIO)
    for _ in range(10):
        area, ratio, left, top = torch.rand(4).tolist()
        area = width * height * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = round(left * (width - w)), round(top * (height - h))
            yield x, y, x + w, y + h


class Collator:
    """Stacks rows of `Crops` into `pixel_values` [B, 3, H, W], normalized, and `labels` [B]."""

    def __init__(self, mean: list[float], std: list[float]):
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Raises BadData where every image of the batch was skipped."""
        if not rows:
            raise BadData("no image of this batch could be decoded")
        pixels = torch.stack([row["pixels"] for row in rows]).float()
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": (pixels / 255 - self.mean) / self.std, "labels": labels}
