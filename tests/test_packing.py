"""Bit streams against hand-made bytes and a slow loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2 import packing
from hf_r2.packing import pack_bits, packed_bytes, unpack_bits
from tests.reference import packing as slow


def test_golden():
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    # 5, 3, 7 at 3 bits: 101, 011, 111 -> stream 111 011 101 read from the right: 11011101 and 1
    assert pack_bits(torch.tensor([5, 3, 7], dtype=torch.uint8), 3).tolist() == [0b11_011_101, 0b1]


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_round_trip_and_slow_reference(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == slow.pack(codes, bits)
    assert packed.numel() == packed_bytes(len(codes), bits)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


def test_codes_that_do_not_fit():
    with pytest.raises(ValueError, match="codes up to 4 do not fit in 2 bits"):
        pack_bits(torch.tensor([4], dtype=torch.uint8), 2)


def test_wrong_number_of_bytes():
    with pytest.raises(ValueError, match="5 codes of 3 bits take 2 bytes, but there are 3"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("more", [0, 1, 63])
def test_many_chunks_equal_the_slow_reference(monkeypatch, bits, more):
    monkeypatch.setattr(packing, "CHUNK", 128)
    codes = torch.randint(2**bits, (3 * 128 + more,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.tolist() == slow.pack(codes.tolist(), bits)
    assert torch.equal(unpack_bits(packed, bits, len(codes)), codes)
    inner = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]  # as read from a file: words out of place
    assert torch.equal(unpack_bits(inner, bits, len(codes)), codes)
