"""Codes of 1 to 8 bits to bytes and back: a little-endian bit stream without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_r2.grid import check_bits

BLOCK = 64  # codes that fill a whole number of words of 64 bits, whatever their width
CHUNK = 1 << 19  # codes handled at once, in cache
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # widths at which 8 codes fill an integer


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, uint8) to bytes, [ceil(N * bits / 8)] uint8; the first code in the lowest bits.

    Raises ValueError for codes that do not fit in `bits` bits.
    """
    check_bits(bits)
    codes = codes.flatten()
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes up to {int(codes.max())} do not fit in {bits} bits")
    codes, count = codes.to(torch.uint8), codes.numel()
    if bits == 8:
        return codes.clone()
    words = torch.empty(-(-count // BLOCK) * bits, dtype=torch.int64, device=codes.device)
    for start in range(0, count, CHUNK):
        part = codes[start : start + CHUNK]
        part = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)) if part.numel() % BLOCK else part.clone()
        squeezed = _squeezed_(part.view(torch.int64), bits).view(-1, 8)
        place = start // BLOCK * bits
        _interleave_(squeezed, words[place : place + squeezed.shape[0] * bits].view(-1, bits), bits)
    return words.view(torch.uint8)[: packed_bytes(count, bits)].clone()


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
    codes = torch.empty(-(-count // BLOCK) * BLOCK, dtype=torch.uint8, device=packed.device)
    for start in range(0, count, CHUNK):
        part = packed[start // 8 * bits : (start + CHUNK) // 8 * bits]
        part = torch.nn.functional.pad(part, (0, -part.numel() % (8 * bits)))
        part = part if part.storage_offset() % 8 == 0 else part.clone()  # a word starts at a multiple of its bytes
        groups = codes[start : start + CHUNK].view(torch.int64)
        _separate_(part.view(torch.int64).view(-1, bits), groups.view(-1, 8), bits)
        _spread_(groups, bits)
    return codes[:count]


def _masks(bits: int) -> list[tuple[int, int, int]]:
    """Three rounds that join neighbours in a word of 8 bytes: the mask of the lower ones, of the upper ones, the shift."""
    rounds = []
    for width, held in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        lower = sum((2**held - 1) << place for place in range(0, 64, 2 * width))
        rounds.append((lower, lower << width, width - held))
    return rounds


def _squeezed_(words: Tensor, bits: int) -> Tensor:
    """Words of 8 codes, one a byte, to words whose lowest 8 x `bits` bits hold them; in place."""
    upper = torch.empty_like(words)
    for low, high, shift in _masks(bits):
        torch.bitwise_and(words, high, out=upper).bitwise_right_shift_(shift)
        words.bitwise_and_(low).bitwise_or_(upper)
    return words


def _spread_(words: Tensor, bits: int) -> None:
    """The inverse of `_squeezed_`, in place."""
    upper = torch.empty_like(words)
    for low, high, shift in reversed(_masks(bits)):
        torch.bitwise_left_shift(words, shift, out=upper).bitwise_and_(high)
        words.bitwise_and_(low).bitwise_or_(upper)


def _interleave_(groups: Tensor, words: Tensor, bits: int) -> None:
    """[R, 8] groups of 8 x `bits` bits into `words` [R, bits] without gaps."""
    if bits in WHOLE:
        words.view(-1).view(WHOLE[bits]).copy_(groups.view(-1))
        return
    words.zero_()
    for i in range(8):
        word, offset = divmod(i * 8 * bits, 64)
        words[:, word] |= groups[:, i] << offset
        if offset + 8 * bits > 64:  # the rest of it begins the next word
            words[:, word + 1] |= groups[:, i] >> (64 - offset)


def _separate_(words: Tensor, groups: Tensor, bits: int) -> None:
    """The inverse of `_interleave_`: into `groups` [R, 8]."""
    if bits in WHOLE:
        groups.view(-1).copy_(words.reshape(-1).view(WHOLE[bits]))
        return
    mask = 2 ** (8 * bits) - 1
    for i in range(8):
        word, offset = divmod(i * 8 * bits, 64)
        if offset + 8 * bits <= 64:
            torch.bitwise_and(words[:, word] >> offset, mask, out=groups[:, i])
        else:  # the sign bit is shifted in from the left, and masked away
            low = (words[:, word] >> offset) & (2 ** (64 - offset) - 1)
            torch.bitwise_or(low, (words[:, word + 1] << (64 - offset)) & mask, out=groups[:, i])
