"""A weight's correction of low rank: how a weight is a matrix, what a rank costs, and the two factors as stored.

A weight [d0, d1, ...kernel] is unfolded with the kernel on either side: "right", [d0, d1 * K], or "left", [d0 * K, d1].
For a convolution, factors of the first are a k x k convolution and then a 1 x 1 one, of the second a 1 x 1 one and then
k x k (CoRa, arXiv:2408.00923; its code takes the first, its theorem 1 the second). The groups of a convolution share the
right factor: so a depthwise kernel [C, 1, k, k] has rank k * k, and a rank costs C + k * k numbers; with factors for each
group it would have rank one and cost more than the kernel itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_r2.grid import Grid, dequantize, quantize, scale_and_zero_point

FLOAT_BITS = 16  # the width of factors that are not quantized: float16
SIDES = ("right", "left")


def check_adapter_bits(bits: object) -> None:
    """Raises ValueError unless factors can be stored in `bits` bits: 2 to 8, or 16."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not (2 <= bits <= 8 or bits == FLOAT_BITS):
        raise ValueError(f"adapter_bits must be an integer from 2 to 8, or {FLOAT_BITS} for float16, got {bits!r}")


def sides(shape: Sequence[int], kernel: str) -> tuple[int, int]:
    """Rows and columns of the matrix that a weight of this shape is with its kernel on that side."""
    size = math.prod(shape[2:])
    return (shape[0], shape[1] * size) if kernel == "right" else (shape[0] * size, shape[1])


def cheaper_side(shape: Sequence[int]) -> str:
    """The side of the kernel for which a rank takes fewer numbers (rows + columns); "right" where both take as many."""
    return min(SIDES, key=lambda kernel: sum(sides(shape, kernel)))


def unfold(weight: Tensor, kernel: str) -> Tensor:
    """The weight as a matrix, shape as `sides` says."""
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
    return flat.flatten(1) if kernel == "right" else flat.transpose(1, 2).flatten(0, 1)


def fold(matrix: Tensor, kernel: str, shape: Sequence[int]) -> Tensor:
    """The inverse of `unfold`."""
    if kernel == "right":
        return matrix.reshape(tuple(shape))
    return matrix.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(tuple(shape))


@dataclass(frozen=True)
class LowRank:
    """Factors `left` [m, r] and `right` [r, n] as stored, float16; their product, folded, is added to a weight.

    Below 16 bits both are uint8 codes on symmetric grids, with a scale, float32, for each rank: `left_scale` [1, r],
    `right_scale` [r, 1]. `kernel` is the side the weight's kernel is on.
    """

    left: Tensor
    right: Tensor
    kernel: str
    bits: int = FLOAT_BITS
    left_scale: Tensor | None = None
    right_scale: Tensor | None = None

    @classmethod
    def of(cls, left: Tensor, right: Tensor, kernel: str, bits: int = FLOAT_BITS) -> LowRank:
        """Stores float factors in `bits` bits (2 to 8, or 16 for float16).

        Raises ValueError for another width, and for factors that float16 cannot hold.
        """
        check_adapter_bits(bits)
        if bits < FLOAT_BITS:
            left, left_scale = _quantized(left.float(), 0, bits)
            right, right_scale = _quantized(right.float(), 1, bits)
            return cls(left, right, kernel, bits, left_scale, right_scale)
        half = left.to(torch.float16), right.to(torch.float16)
        if not all(torch.isfinite(factor).all() for factor in half):
            raise ValueError("the factors hold values that float16 cannot: NaN, infinity, or beyond 65504")
        return cls(*half, kernel)

    @property
    def rank(self) -> int:
        """Columns of `left`, rows of `right`."""
        return self.left.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors, float32."""
        if self.left_scale is None or self.right_scale is None:
            return self.left.float(), self.right.float()
        zero = torch.tensor(Grid(self.bits).symmetric_zero_point, device=self.left.device)
        return dequantize(self.left, self.left_scale, zero), dequantize(self.right, self.right_scale, zero)

    def weight(self, shape: Sequence[int]) -> Tensor:
        """What is added to a weight of this shape, float32."""
        left, right = self.factors()
        return fold(left @ right, self.kernel, shape)

    def stored_bits(self) -> int:
        """Bits that go into the file."""
        scales = 0 if self.left_scale is None else 32 * 2 * self.rank
        return self.bits * (self.left.numel() + self.right.numel()) + scales


def _quantized(factor: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, and the scale of each rank; `dim` is the axis that a scale is shared along."""
    grid = Grid(bits)
    high = factor.abs().amax(dim, keepdim=True)
    scale, zero_point = scale_and_zero_point(-high, high, grid)
    return quantize(factor, scale, zero_point, grid), scale
