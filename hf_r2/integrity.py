"""Checksums of a checkpoint's tensors, kept in the header of its safetensors files."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "hf_r2"
DTYPES = {"U8": torch.uint8, "F32": torch.float32}  # by their names in safetensors


def checksums(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Header metadata that holds the CRC-32 of every tensor; by content, for transformers may rename keys as it saves."""
    sums = {f"{checksum(t)}" for t in state_dict.values() if isinstance(t, Tensor) and not t.is_meta}
    return {KEY: json.dumps({"crc32": sorted(sums)})}


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return f"{zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0:08x}"


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and where its data begin.

    Raises ValueError, naming the file, where it is cut short or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is damaged: its header is cut short; fetch or save the checkpoint again")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged: its header cannot be read; fetch or save the checkpoint again"
            ) from error
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(
            f"{file} is damaged: it should have {8 + length + max(ends, default=0)} bytes and has {size}; "
            "fetch or save the checkpoint again"
        )
    return header, 8 + length


def verify(
    files: Iterable[str | Path], keep: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Shapes of all tensors in these safetensors files, after checking every byte that has a checksum.

    Every byte being read anyway, the tensors that `keep` wants by their names come with the shapes, if their dtype is one of
    `DTYPES`.

    Raises ValueError that names the file and the tensor for damage. Files without our checksums are only checked for
    their length.
    """
    shapes: dict[str, list[int]] = {}
    kept: dict[str, Tensor] = {}
    for file in map(Path, files):
        header, begin = read_header(file)
        metadata = header.pop("__metadata__", None) or {}
        try:
            known = set(json.loads(metadata[KEY])["crc32"]) if KEY in metadata else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: its checksums cannot be read") from error
        with file.open("rb") as stream:
            for name, entry in header.items():
                shapes[name] = entry["shape"]
                first, last = entry["data_offsets"]
                wanted = keep(name) and entry["dtype"] in DTYPES and last > first
                if known is None and not wanted:
                    continue
                data = bytearray(last - first)
                stream.seek(begin + first)
                stream.readinto(data)
                if known is not None and f"{zlib.crc32(data):08x}" not in known:
                    raise ValueError(
                        f"{file} is damaged: the bytes of {name!r} changed; fetch or save the checkpoint again"
                    )
                if wanted:
                    kept[name] = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return shapes, kept
