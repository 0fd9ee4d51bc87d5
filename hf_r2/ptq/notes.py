"""What a long method has finished, kept in a folder, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_r2.integrity import checksum


class Notes:
    """Tensors by key, one file each in `folder` (None: nothing is kept). `about` says what they belong to.

    Notes of another model, other options or other data are not read.
    """

    def __init__(self, folder: str | os.PathLike | None, about: Mapping[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.about = f"{zlib.crc32(json.dumps(about, sort_keys=True, default=str).encode()):08x}"
        if self.folder is not None:
            if self.folder.is_file():
                raise ValueError(f"resume_dir {self.folder} is a file; it must be a folder")
            self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, key: str) -> Path | None:
        return (
            None if self.folder is None else self.folder / f"{self.about}-{zlib.crc32(key.encode()):08x}.safetensors"
        )

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors noted under `key`, None where there are none or the file is damaged."""
        file = self._file(key)
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, OSError):
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Notes tensors under `key`: beside first, then renamed."""
        file = self._file(key)
        if file is not None:
            beside = file.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
            beside.replace(file)


def fingerprint(weights: Mapping[str, Tensor], batches: list[dict[str, Any]]) -> dict[str, Any]:
    """What tells one run from another: the float weights, and the number and content of the batches."""
    data = [checksum(v) for batch in (batches[0], batches[-1]) for v in batch.values() if isinstance(v, Tensor)]
    return {"weights": [checksum(w) for w in weights.values()], "batches": len(batches), "data": data}
