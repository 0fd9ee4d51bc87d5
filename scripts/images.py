"""Pictures as tensors: what the image scripts share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm


def square(image: Any, size: int) -> Tensor:
    """The middle of a PIL image, `size` x `size` pixels: uint8 [3, size, size]; images too small for it are scaled up."""
    image = image.convert("RGB")
    if min(image.size) < size:
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


class Pictures:
    """Images decoded once and kept as bytes; normalized as the model's preprocessor_config.json says (else to [-1, 1])."""

    def __init__(self, data: Dataset, size: int, model_folder: str, name: str):
        self.pixels = torch.stack([square(image, size) for image in tqdm(data["image"], desc=f"decoding {name}")])
        self.labels = torch.tensor(data["label"])
        file = Path(model_folder) / "preprocessor_config.json"
        settings = json.loads(file.read_text()) if file.is_file() else {}
        self.mean = torch.tensor(settings.get("image_mean", [0.5] * 3)).view(3, 1, 1)
        self.std = torch.tensor(settings.get("image_std", [0.5] * 3)).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

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
