"""What a loss was computed from."""

from __future__ import annotations

from torch import Tensor


def leaves(loss: Tensor) -> set[int]:
    """Ids of the parameters that the graph of `loss` ends in."""
    seen, found = set(), set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(getattr(node, "variable")))  # noqa: B009  # of AccumulateGrad alone
        stack.extend(next_node for next_node, _ in node.next_functions)
    return found
