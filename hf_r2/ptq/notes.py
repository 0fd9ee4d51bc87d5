"""What a long method has finished, kept in a folder, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_r2.attach import encoder_of, prepared_layers
from hf_r2.calibration import quantizer_of
from hf_r2.encoders.affine import Affine
from hf_r2.integrity import checksum


class Notes:
    """Tensors by key, one file each in `folder` (None: nothing is kept), of a method with `settings` on a prepared model.

    Notes of another model, other grids, other settings or other batches are not read.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
    ):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            if self.folder.is_file():
                raise ValueError(f"resume_dir {self.folder} is a file; it must be a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            about = json.dumps({**fingerprint(model, batches), "settings": settings}, sort_keys=True, default=str)
            self.about = f"{zlib.crc32(about.encode()):08x}"

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


def fingerprint(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells one run on a prepared model from another, for JSON: all that the result depends on but the settings.

    The modules, every tensor (with the scales and zero points of the grids), each layer's grids, every batch.
    """
    return {
        "modules": repr(model),
        "tensors": {key: checksum(value) for key, value in model.state_dict().items() if isinstance(value, Tensor)},
        "grids": {layer.name: _grids(layer.module, encoder_of(layer)) for layer in prepared_layers(model)},
        "batches": [{key: [_told(leaf) for leaf in tree_leaves(v)] for key, v in batch.items()} for batch in batches],
    }


def _grids(layer: nn.Module, encoder: nn.Module) -> list[Any]:
    weight = [str(encoder.grid), encoder.axis] if isinstance(encoder, Affine) else []
    quantizer = quantizer_of(layer)
    return [*weight, *([] if quantizer is None else [str(quantizer.grid), quantizer.dynamic])]


def _told(value: Any) -> Any:
    return [str(value.dtype), list(value.shape), checksum(value)] if isinstance(value, Tensor) else str(value)
