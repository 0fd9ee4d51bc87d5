"""A weight as vectors of neighbours along its first axis: what vector clustering and its range loss see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONVENTION = "along_axis_0"  # written beside every palette of vectors


def to_vectors(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Vectors [numel // dim, dim] and the up to dim - 1 elements that are left over.

    The first axis (output channels, but for transposed convolutions) is swapped with the last and becomes the innermost,
    as in coremltools: a vector holds `dim` neighbours along it. For dim 1 the order is that of the weight itself.
    """
    flat = w.reshape(-1) if dim == 1 else w.transpose(0, -1).reshape(-1)
    whole = flat.numel() // dim * dim
    return flat[:whole].view(-1, dim), flat[whole:]


def from_vectors(vectors: Tensor, rest: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The weight of this shape back from `to_vectors`."""
    flat = vectors.reshape(-1)
    if vectors.shape[1] == 1:
        return flat.view(shape)
    if rest is not None and rest.numel():
        flat = torch.cat([flat, rest])
    swapped = list(shape)
    swapped[0], swapped[-1] = swapped[-1], swapped[0]
    return flat.view(swapped).transpose(0, -1)


def to_columns(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same vectors as columns [b, dim, n], b times n of them, and what is left over; a view of `w` where it can be.

    Where the first axis is a multiple of `dim` nothing is copied: its neighbours are rows of a contiguous weight.
    """
    if _rows(w.shape, dim):
        return w.reshape(w.shape[0] // dim, dim, -1), w.new_empty(0)
    vectors, rest = to_vectors(w, dim)
    return vectors.T[None], rest


def from_columns(columns: Tensor, rest: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The weight of this shape back from `to_columns`."""
    if _rows(shape, columns.shape[1]):
        return columns.reshape(shape)
    return from_vectors(columns[0].T, rest, shape)


def _rows(shape: Sequence[int], dim: int) -> bool:
    return dim > 1 and len(shape) > 1 and shape[0] % dim == 0 and 0 not in shape
