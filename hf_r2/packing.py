"""Codes of 1 to 8 bits to bytes and back: a little-endian bit stream without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_r2.grid import check_bits


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _unit(bits: int) -> tuple[int, int, torch.dtype]:
    """Codes in a unit, bytes in it, and the integer that holds it: one byte where codes fit in it without a rest."""
    return (8 // bits, 1, torch.uint8) if 8 % bits == 0 else (8, bits, torch.int64)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, uint8) to bytes, [ceil(N * bits / 8)] uint8; the first code in the lowest bits.

    Raises ValueError for codes that do not fit in `bits` bits.
    """
    check_bits(bits)
    codes = codes.flatten()
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes up to {int(codes.max())} do not fit in {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8).clone()
    per_unit, unit_bytes, dtype = _unit(bits)
    count = codes.numel()
    codes = torch.nn.functional.pad(codes, (0, -count % per_unit)).view(-1, per_unit).to(dtype)
    units = codes[:, 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_unit):
        units |= codes[:, i] << (i * bits)
    packed = units.view(torch.uint8).view(-1, units.element_size())[:, :unit_bytes]
    return packed.reshape(-1)[: packed_bytes(count, bits)].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes from `pack_bits` back to `count` codes, [count] uint8.

    Raises ValueError where the number of bytes is not that of `count` codes.
    """
    check_bits(bits)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, but there are {packed.numel()}"
        )
    if bits == 8:
        return packed.clone()
    per_unit, unit_bytes, dtype = _unit(bits)
    units = torch.nn.functional.pad(packed, (0, -packed.numel() % unit_bytes)).view(-1, unit_bytes)
    if dtype != torch.uint8:
        units = torch.nn.functional.pad(units, (0, 8 - unit_bytes)).view(dtype)
    codes = torch.empty(units.shape[0], per_unit, dtype=torch.uint8, device=packed.device)
    for i in range(per_unit):
        codes[:, i] = (units[:, 0] >> (i * bits)) & (2**bits - 1)
    return codes.view(-1)[:count]
