"""Axes of a graph's inputs that may differ from the example it is read with: the batch, and the length of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

SIZES = (2, 3)  # of a free axis, batch and length, of which the example has but one: torch.export would fix it at 1
WHAT = ("batch size", "length")


def free_axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What torch.export takes as `dynamic_shapes` for these inputs; transformers takes flags out of them before."""
    batch = _batch(inputs)
    return {name: shapes for name, value in inputs.items() if (shapes := _shapes(value, batch)) is not None}


def repeated(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with every free axis of size 1 repeated; what a batch of several shares stays as it is."""
    batch = _batch(inputs)

    def grown(value: Any) -> Any:
        for axis in _axes(value, batch) if isinstance(value, Tensor) else ():
            if value.shape[axis] == 1:
                value = value.repeat_interleave(SIZES[axis], dim=axis)
        return value

    return tree_map(grown, dict(inputs))


def check_free(graph: Any, inputs: Mapping[str, Any], model: str) -> None:
    """Raises ValueError where a batch size or the length of token ids is fixed in `graph`, an `onnx_ir.Graph`, all the same."""
    batch = _batch(inputs)
    shared = {name for name, value in inputs.items() if isinstance(value, Tensor) and 0 not in _axes(value, batch)}
    for value in graph.inputs:
        ids = len(value.shape) == 2 and value.dtype.is_integer()  # what else has two axes may be fixed by nature
        for axis in range(2 if ids else min(1, len(value.shape))):
            size = str(getattr(value.shape[axis], "value", value.shape[axis]))
            if not size.isidentifier() and not (axis == 0 and value.name in shared):
                raise ValueError(
                    f"{model} decides by the {WHAT[axis]} what it computes, so that axis {axis} of {value.name!r} stays {size} "
                    "in its graph: export it with dynamic=False, in the shapes that are wanted"
                )


def _batch(inputs: Mapping[str, Any]) -> int:
    return max((len(v) for v in tree_leaves(dict(inputs)) if isinstance(v, Tensor) and v.dim()), default=1)


def _axes(value: Tensor, batch: int) -> list[int]:
    """The batch, unless all samples share what is given, and the length of token ids and of hidden states."""
    axes = [] if value.dim() == 0 or (len(value) == 1 and batch > 1) else [0]
    return axes + ([1] if value.dim() in (2, 3) else [])


def _shapes(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return dict.fromkeys(_axes(value, batch), torch.export.Dim.AUTO)
    leaves = tree_leaves(value)
    if not leaves or leaves[0] is value:  # a flag, or nothing
        return None
    return [_shapes(leaf, batch) for leaf in leaves]  # an output of an earlier part: a list of what it holds is wanted
