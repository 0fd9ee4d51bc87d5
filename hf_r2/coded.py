"""Entropy-coded tensors of packed layers: as streams in the state dict that is saved, decoded once it is loaded.

A stream has the key of its tensor, and is uint8 with one dimension; `Layout.streams` in config.json says which tensors are
streams, and of how many bytes. Codes always are; scales, zero points and palettes where it saves something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.entropy import (
    compress,
    compress_codes,
    decompress,
    decompress_codes,
    largest_stream,
    smallest_stream,
    symbol_count,
)
from hf_r2.packed_layers import Layout, packed_layers

CODES = "weight_packed"
BESIDE = ("weight_scale", "weight_zero_point", "weight_centroids")  # never of one dimension themselves


def code_streams(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """A state dict with streams in the place of tensors, and {layer: {tensor: bytes of its stream}}.

    Tied layers share a stream as they share the tensor.
    """
    coded, sizes = dict(state_dict), {}
    done: dict[int, Tensor] = {}
    for name, module in packed_layers(model).items():
        layout, packed = module.__dict__["weight_layout"], module.weight_packed
        if id(packed) not in done:
            done[id(packed)] = compress_codes(packed.data, layout.bits, code_count(module))  # type: ignore[arg-type]
        streams = {CODES: done[id(packed)]}
        for key in BESIDE:
            tensor = getattr(module, key, None)
            if tensor is not None and (stream := compress(tensor)).numel() < tensor.numel() * tensor.element_size():
                streams[key] = stream
        coded |= {f"{name}.{key}": stream for key, stream in streams.items()}
        sizes[name] = {key: stream.numel() for key, stream in streams.items()}
    return coded, sizes


def code_count(module: nn.Module) -> int:
    """Codes of a packed layer."""
    return module.__dict__["weight_shape"].numel() // module.__dict__["weight_layout"].dim


def await_streams_(module: nn.Module, name: str) -> None:
    """Makes place for streams in an empty packed layer, in place, where its layout says that the checkpoint has them.

    Raises ValueError, naming the layer, for a tensor that cannot be a stream, and for a number of bytes that cannot be right.
    """
    layout: Layout = module.__dict__["weight_layout"]
    if layout.streams is None:
        return
    awaited = {}
    for key, count in layout.streams.items():
        tensor = getattr(module, key, None) if key in (CODES, *BESIDE) else None
        if tensor is None:
            raise ValueError(
                f"config.json says that layer {name!r} has an entropy-coded {key!r}, which it cannot have"
            )
        codes = symbol_count(layout.bits, code_count(module))
        needed = codes if key == CODES else tensor.numel() * tensor.element_size()
        if not isinstance(count, int) or not smallest_stream(needed) <= count <= largest_stream(needed):
            raise ValueError(
                f"config.json says that {key} of layer {name!r} takes {count!r} coded bytes, which cannot be right for "
                f"{needed} bytes"
            )
        awaited[key] = (tensor.shape, tensor.dtype)
        stream = torch.empty(count, dtype=torch.uint8, device=tensor.device)
        if key == CODES:
            module._parameters[key] = nn.Parameter(stream, requires_grad=False)
        else:
            module._buffers[key] = stream
    module.__dict__["weight_awaited"] = awaited


def decode_streams_(model: nn.Module) -> None:
    """Puts tensors in the place of the streams that were loaded, in place; tied layers keep sharing theirs.

    Raises ValueError that names the layer for a stream that is damaged or of the wrong length.
    """
    done: set[int] = set()
    for name, module in packed_layers(model).items():
        for key, (shape, dtype) in module.__dict__.pop("weight_awaited", {}).items():
            stream: Tensor = getattr(module, key)
            try:
                if key != CODES:
                    module._buffers[key] = decompress(stream.to(torch.uint8), shape, dtype)
                elif id(stream) not in done:
                    bits = module.__dict__["weight_layout"].bits
                    stream.data = decompress_codes(stream.data.to(torch.uint8), bits, code_count(module))
                    done.add(id(stream))
            except ValueError as error:
                raise ValueError(f"{key} of layer {name!r}: {error}; fetch or save the checkpoint again") from error
        if module.__dict__["weight_layout"].streams is not None:
            module.__dict__["weight_layout"] = replace(module.__dict__["weight_layout"], streams=None)
