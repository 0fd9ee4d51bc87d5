"""Slow packing: bit by bit."""


def pack(codes, bits):
    """A little-endian bit stream of `codes` as a list of bytes."""
    stream = [(code >> i) & 1 for code in codes for i in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << i for i, bit in enumerate(stream[k : k + 8])) for k in range(0, len(stream), 8)]
