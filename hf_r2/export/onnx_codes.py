"""ONNX operators in a graph that torch.export records, and packed bytes unpacked with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def op(
    name: str, inputs: Sequence[Tensor], shape: Sequence[Any], dtype: torch.dtype, domain: str = "", **attributes: Any
) -> Tensor:
    """The operator `name` in the graph being recorded; its output has this shape and dtype. Computes nothing itself."""
    kind = f"{domain}::{name}" if domain else name
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape, version=1 if domain else None)


class Unpacking(nn.Module):
    """The constants that unpacking codes of `bits` bits takes, as buffers.

    Where codes fill a byte without a rest: `shifts` and `mask`, uint8. Else eight codes lie in `bits` bytes, which make one
    64-bit integer: `weights` of its bytes, and `steps` to divide it by.
    """

    def __init__(self, bits: int):
        super().__init__()
        if 8 % bits == 0:
            self.register_buffer("shifts", torch.arange(0, 8, bits).to(torch.uint8))
            self.register_buffer("mask", torch.tensor(2**bits - 1, dtype=torch.uint8))
        else:
            self.register_buffer("weights", 256 ** torch.arange(bits))
            self.register_buffer("steps", 2 ** (bits * torch.arange(8)))


def unpacked(packed: Tensor, bits: int, shape: Sequence[Any], constants: nn.Module) -> Tensor:
    """`hf_r2.packing.unpack_bits` in operators of ONNX: bytes [..] to codes of this shape, uint8."""
    if bits == 8:
        return packed.view(shape)
    if 8 % bits == 0:
        shifts: Tensor = constants.shifts  # type: ignore[assignment]
        units = [*packed.shape, len(shifts)]
        shifted = op("BitShift", [packed.unsqueeze(-1), shifts], units, torch.uint8, direction="RIGHT")
        codes = op("BitwiseAnd", [shifted, constants.mask], units, torch.uint8)  # type: ignore[list-item]
    else:
        padded = torch.nn.functional.pad(packed.long(), (0, -packed.numel() % bits)).view(-1, bits)
        whole = (padded * constants.weights).sum(1, keepdim=True)  # type: ignore[operator]
        codes = (whole // constants.steps % 2**bits).to(torch.uint8)  # type: ignore[operator]
    return codes.flatten()[: math.prod(shape)].view(shape) if packed.dim() == 1 else codes.view(shape)
