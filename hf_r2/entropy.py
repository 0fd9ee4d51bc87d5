"""Entropy coding of what a packed layer stores: deflate streams (zlib), which any Python reads.

Codes of 1, 2, 4 and 8 bits are coded as their packed bytes, others as bytes of whole codes, so that Huffman's symbols are
whole groups of codes: within 3 % of the entropy of single codes from about 2 bits on, up to a quarter above it at 0.5.
Float tensors are coded plane by plane of their bytes, since exponents repeat and mantissas do not.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from hf_r2.grid import check_bits
from hf_r2.packing import pack_bits, unpack_bits

DENSE = (1, 2, 4, 8)  # widths at which bytes hold whole codes as they are packed
HIGHEST_RATIO = 1032  # of deflate: 258 bytes of 2 bits each
MEMORY = 9  # zlib's own number for its largest blocks of symbols
OVERHEAD = 64  # a stream that cannot compress is stored in blocks of 5 bytes each, beside this


def entropy(codes: Tensor) -> float:
    """Empirical entropy of single codes (uint8, any shape), bits per code: what no coder of single codes goes below."""
    share = torch.bincount(codes.flatten().int(), minlength=1).double() / max(codes.numel(), 1)
    share = share[share > 0]
    return max(0.0, float(-(share * share.log2()).sum()))


def compress(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` as a deflate stream, [n] uint8; floats by planes of their bytes."""
    data = _planes(tensor.detach().cpu()).numpy().tobytes()
    streams = [_deflate(data, zlib.Z_HUFFMAN_ONLY), _deflate(data, zlib.Z_DEFAULT_STRATEGY)]
    return torch.frombuffer(bytearray(min(streams, key=len)), dtype=torch.uint8)


def decompress(stream: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and dtype back from `compress`, on the device of `stream`.

    Never makes more bytes than the tensor has. Raises ValueError for a stream that is damaged or that holds another number
    of bytes; one that could not hold so many is refused before anything is decompressed.
    """
    size = torch.empty((), dtype=dtype).element_size()
    count = shape.numel() * size
    if stream.numel() < smallest_stream(count):
        raise ValueError(f"{stream.numel()} coded bytes cannot hold {count} bytes")
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(stream.detach().cpu().contiguous().numpy().data, count + 1)
    except zlib.error as error:
        raise ValueError(f"the coded bytes are damaged: {error}") from error
    if len(data) != count or not inflate.eof or inflate.unused_data:
        found = f"more than {count}" if len(data) > count else len(data)
        raise ValueError(f"the coded bytes hold {found} bytes where {count} are needed")
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    return flat.view(size, shape.numel()).t().flatten().view(dtype).view(shape).to(stream.device)


def compress_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """`count` codes, packed by `pack_bits`, as a stream, [n] uint8."""
    if bits in DENSE:
        return compress(packed)
    codes, group = unpack_bits(packed.cpu(), bits, count), 8 // bits
    groups = torch.nn.functional.pad(codes, (0, -count % group)).view(-1, group)
    return compress((groups << torch.arange(group, dtype=torch.uint8) * bits).sum(1, dtype=torch.uint8))


def decompress_codes(stream: Tensor, bits: int, count: int) -> Tensor:
    """The packed codes back from `compress_codes`, [ceil(count * bits / 8)] uint8; raises as `decompress` does."""
    check_bits(bits)
    symbols = decompress(stream, torch.Size([symbol_count(bits, count)]), torch.uint8)
    if bits in DENSE:
        return symbols
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=symbols.device) * bits
    codes = (symbols[:, None] >> shifts) & (2**bits - 1)
    return pack_bits(codes.flatten()[:count], bits)


def symbol_count(bits: int, count: int) -> int:
    """Bytes that `count` codes are coded as."""
    return -(-count // (8 // bits))


def smallest_stream(count: int) -> int:
    """Bytes that the stream of `count` bytes takes at least."""
    return max(2, count // HIGHEST_RATIO - OVERHEAD)


def largest_stream(count: int) -> int:
    """Bytes that the stream of `count` bytes takes at most."""
    return count + count // 1024 + OVERHEAD


def _planes(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().flatten().view(torch.uint8)
    return data.view(tensor.numel(), tensor.element_size()).t().contiguous()


def _deflate(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, MEMORY, strategy)
    return coder.compress(data) + coder.flush()
