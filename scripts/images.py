"""Pictures as tensors: what the image scripts share. Files that do not decode are named, counted, and refused or skipped."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from torch import Tensor
from tqdm import tqdm

import data_files

BAD_IMAGES = ("refuse", "skip")
NAMED = 5  # so many files that do not decode are named; the rest are counted


class BadData(ValueError):
    """Rows that cannot be used; a data loader's worker hands it on, with its message in the last line."""


class Decoder:
    """RGB images from what a column holds undecoded; one that does not decode ends the run, or is counted and gives None.

    `count` is shared by the processes of a data loader; it counts an image each time that it is met. Raises BadData
    for an image that does not decode (naming its file, or its place where it has none) unless told to skip.
    """

    def __init__(self, source: str, bad_images: str = "refuse"):
        if bad_images not in BAD_IMAGES:
            raise ValueError(f"bad_images must be one of {', '.join(BAD_IMAGES)}, got {bad_images!r}")
        self.source, self.skip = source, bad_images == "skip"
        self.count = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __call__(self, image: dict[str, Any] | None, place: str) -> Any:
        """A PIL image of {"bytes", "path"}, or None for one that is skipped; `place` names it where it has no path."""
        from PIL import Image, UnidentifiedImageError

        try:
            if image is None or not (image["bytes"] or image["path"]):
                raise ValueError("it is empty")
            stream: Any = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
            with Image.open(stream) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = (image or {}).get("path") or place
            reason = "no image format" if isinstance(error, UnidentifiedImageError) else error
            if not self.skip:
                raise BadData(
                    f"{self.source}: {name} does not decode ({reason}); --bad_images skip leaves such images out"
                ) from error
            self.count += 1
            if self.count <= NAMED:
                print(f"{self.source}: {name} does not decode ({reason}); skipped", file=sys.stderr)
            return None


def square(image: Any, size: int) -> Tensor:
    """The middle of a PIL image, `size` x `size` pixels: uint8 [3, size, size]; images too small for it are scaled up."""
    image = image.convert("RGB")
    if min(image.size) < size:
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def middle(image: Any, size: int, shorter: int) -> Tensor:
    """The middle of a PIL image whose shorter side is first scaled to `shorter` pixels: uint8 [3, size, size]."""
    scale = shorter / min(image.size)
    return square(
        image.resize((round(image.width * scale), round(image.height * scale)), resample=2), size
    )  # 2: bilinear


class Pictures:
    """Images decoded once and kept as bytes; normalized as the model's preprocessor_config.json says (else to [-1, 1]).

    The middle is cut out of each as it is, or with `crop_fraction` out of its shorter side scaled to size / crop_fraction.
    Ends with one line for an image that does not decode, or leaves it out, as `bad_images` says. `rows`: the rows' numbers in
    the file `name`; default: as they come. `labelled`: whether there are labels, and they matter.
    """

    def __init__(
        self,
        data: Dataset,
        size: int,
        model_folder: str,
        name: str,
        bad_images: str = "refuse",
        crop_fraction: float | None = None,
        rows: Sequence[int] | None = None,
        labelled: bool = True,
    ):
        columns = ["image", "label"] if labelled else ["image"]
        data_files.need(columns, data.column_names, name)
        decode, pixels, labels = Decoder(name, bad_images), [], []
        read: Any = data.select_columns(columns).cast_column("image", ImageColumn(decode=False))
        for number, row in enumerate(tqdm(read, desc=f"decoding {name}")):
            try:
                image = decode(row["image"], f"row {number if rows is None else rows[number]}")
            except BadData as error:
                raise SystemExit(str(error)) from error
            if image is not None:
                shorter = round(size / crop_fraction) if crop_fraction else None
                pixels.append(middle(image, size, shorter) if shorter else square(image, size))
                labels.extend(row[column] for column in columns[1:])
        if not pixels:
            raise SystemExit(f"{name}: no image in {len(data)} rows")
        self.bad_images = int(decode.count)
        self.pixels, self.labels = torch.stack(pixels), torch.tensor(labels)
        file = Path(model_folder) / "preprocessor_config.json"
        settings = json.loads(file.read_text()) if file.is_file() else {}
        self.mean = torch.tensor(settings.get("image_mean", [0.5] * 3)).view(3, 1, 1)
        self.std = torch.tensor(settings.get("image_std", [0.5] * 3)).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Pixel values [size, 3, H, W] from `start` on."""
        return {"pixel_values": self.normalized(self.pixels[start : start + size])}

    def normalized(self, pixels: Tensor) -> Tensor:
        """Bytes [..., 3, H, W] as the model takes them."""
        return (pixels.float() / 255 - self.mean) / self.std

    def batches(self, size: int, count: int | None = None) -> list[dict[str, Tensor]]:
        """The first `count` images (all by default), without labels."""
        count = len(self) if count is None else min(count, len(self))
        return [self.batch(i, min(size, count - i)) for i in range(0, count, size)]
