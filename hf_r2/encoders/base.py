"""`Encoded`: the one end state of every weight, whichever method made it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.grid import dequantize
from hf_r2.lowrank import LowRank
from hf_r2.vectors import from_vectors


@dataclass(frozen=True)
class Encoded:
    """A weight as stored: `codes` (uint8, in the weight's shape) and what decodes them.

    Affine: `scale` and `zero_point`, float32, broadcastable to the weight; `symmetric` says that the zero point follows
    from the width and is not stored. Palette: `centroids` [2**bits, 1], float32, times `scale` where there is one.
    Palette of vectors: `centroids` [2**bits, dim], codes [numel // dim] in the order of `to_vectors`, `shape` that of the
    weight, `rest` its last numel mod dim elements, float32. `adapter`: what is added to the decoded weight, of low rank.
    """

    codes: Tensor
    bits: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    symmetric: bool = True
    centroids: Tensor | None = None
    rest: Tensor | None = None
    shape: tuple[int, ...] | None = None
    adapter: LowRank | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.codes.shape) if self.shape is None else self.shape

    @property
    def dim(self) -> int:
        """Weights that a code stands for."""
        return 1 if self.centroids is None else self.centroids.shape[1]

    def decode(self) -> Tensor:
        """The weight, float32, in its shape: what the model computes with."""
        value = self.decode_codes()
        return value if self.adapter is None else value + self.adapter.weight(self.weight_shape)

    def decode_codes(self) -> Tensor:
        """The weight without its adapter, float32, in its shape."""
        if self.centroids is not None:
            if self.dim > 1:
                vectors = self.centroids.index_select(0, self.codes.flatten().int())
                return from_vectors(vectors, self.rest, self.weight_shape)
            value = self.centroids[:, 0][self.codes.int()]
            return value if self.scale is None else value * self.scale
        if self.scale is None or self.zero_point is None:
            raise ValueError("an encoded weight needs either centroids or a scale and a zero point")
        return dequantize(self.codes, self.scale, self.zero_point)

    def stored_bits(self) -> int:
        """Bits that go into the file: codes, and scales, zero points, palettes and adapters with them."""
        bits = self.codes.numel() * self.bits + (0 if self.adapter is None else self.adapter.stored_bits())
        if self.centroids is not None:
            bits += 32 * (self.centroids.numel() + (0 if self.rest is None else self.rest.numel()))
        if self.scale is not None:
            bits += 32 * self.scale.numel()
            bits += 0 if self.symmetric or self.centroids is not None else 8 * self.scale.numel()
        return bits


def straight_through(w: Tensor, value: Tensor) -> Tensor:
    """`value` in the forward pass, the identity's gradient in the backward pass."""
    return value.to(w.dtype) if not (torch.is_grad_enabled() and w.requires_grad) else _Identity.apply(w, value)


class _Identity(torch.autograd.Function):
    """Exactly `value`: w + (value - w) would differ from it in the last bit."""

    @staticmethod
    def forward(ctx, w: Tensor, value: Tensor) -> Tensor:
        return value.to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def said_of(encoder: nn.Module) -> str:
    """Whose weight an encoder stands in front of, for messages."""
    return f"the weight of layer {encoder.__dict__['layer']!r}" if "layer" in encoder.__dict__ else "a weight"
