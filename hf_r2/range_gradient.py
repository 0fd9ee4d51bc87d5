"""Where gradients of the range loss go: into `.grad` as it lies in memory, piece by piece, in its own dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_r2.range_forms import Term, flat, is_dense, working_dtype


def deliver_(
    terms: Iterator[Term], dense: bool, x: Tensor, weights: Sequence[Tensor], indices: list[int], grads: list
) -> None:
    """Adds the terms to the gradients of these weights, or makes these.

    A single weight's are added piece by piece, in the order of its memory and in its own dtype.
    """
    w = weights[indices[0]]
    if len(indices) == 1 and is_dense(w):
        grad = grads[indices[0]]
        fresh = grad is None
        if grad is None:
            grad = grads[indices[0]] = (torch.empty_like if dense else torch.zeros_like)(w.detach())
        if grad.stride() == w.stride():
            _add_(flat(grad), terms, fresh=fresh and dense)
            return
    out = (torch.empty_like if dense else torch.zeros_like)(x, dtype=working_dtype(x))
    _add_(out, terms, fresh=dense)
    for i, row in zip(indices, [out] if len(indices) == 1 else out, strict=True):
        grad, more = grads[i], _shaped(row, weights[i])
        grads[i] = more if grad is None else grad.add_(more)


def _shaped(row: Tensor, w: Tensor) -> Tensor:
    """The other way round from `flat`: [n] in the shape, and the order of memory, of `w`."""
    if w.is_contiguous() or not is_dense(w):
        return row.view(w.shape)
    return row.as_strided(w.shape, w.stride(), row.storage_offset())


def _add_(out: Tensor, terms: Iterator[Term], fresh: bool) -> None:
    """Adds the terms to `out`; a `fresh` one holds nothing yet, and is written all over.

    Where `out` is less precise than they are, the terms of a piece are added up before.
    """
    if out.dtype != working_dtype(out):
        terms = _added_up(terms)
    written: slice | None = None
    for place, a, b in terms:
        if isinstance(place, Tensor):
            out.index_add_(0, place, a.to(out.dtype), alpha=b)
            continue
        piece = out if a.shape == out.shape else out[..., place]
        if a.dtype != out.dtype:
            piece.copy_(a) if fresh else piece.add_(a)
        elif fresh and place != written:
            torch.mul(a, b, out=piece)
        elif isinstance(b, Tensor):
            piece.addcmul_(a, b)
        else:
            piece.add_(a, alpha=b)
        written = place


def _added_up(terms: Iterator[Term]) -> Iterator[Term]:
    """The same with one term for each piece, times 1."""
    held: tuple[slice, Tensor] | None = None
    for place, a, b in terms:
        if isinstance(place, Tensor):
            yield place, a, b
        elif held is not None and held[0] == place:
            held[1].addcmul_(a, b) if isinstance(b, Tensor) else held[1].add_(a, alpha=b)
        else:
            if held is not None:
                yield (*held, 1.0)
            held = place, a * b
    if held is not None:
        yield (*held, 1.0)
