"""Whether a model divides its loss by the number of items itself, read off its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn


def consumes_num_items(model: nn.Module) -> bool:
    """Whether the model's loss divides by `num_items_in_batch`: its forward names it, or passes its kwargs to such a loss.

    False where its source does not tell, or the loss depends on the labels (a classification whose `problem_type` is not
    set): Trainer then divides the mean loss of each micro-batch by their number, which suits every loss.
    """
    forward = _syntax(type(model).forward)
    if _mentions(forward, "num_items_in_batch"):
        return True
    loss = _syntax(getattr(model, "loss_function", None)) if _passes_kwargs(forward, "loss_function") else []
    if _mentions(loss, "problem_type"):  # regression and multi-label losses are plain means
        return getattr(getattr(model, "config", None), "problem_type", None) == "single_label_classification"
    return _mentions(loss, "num_items_in_batch") or _passes_kwargs(loss, "fixed_cross_entropy")


def _syntax(function: Callable[..., Any] | None) -> list[ast.AST]:
    """All syntax nodes of a function's source, without its decorators' wrappers; none where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function))) if function is not None else ""
        return list(ast.walk(ast.parse(source)))
    except (OSError, TypeError, SyntaxError):
        return []


def _mentions(nodes: list[ast.AST], name: str) -> bool:
    """As an argument, a variable, an attribute, a keyword or a string (of `kwargs.get`); not in prose."""
    return any(name in (getattr(node, key, None) for key in ("arg", "id", "attr", "value")) for node in nodes)


def _passes_kwargs(nodes: list[ast.AST], function: str) -> bool:
    """Whether `function` (or a method of that name) is called with `**`."""
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    named = [c for c in calls if function in (getattr(c.func, "attr", None), getattr(c.func, "id", None))]
    return any(keyword.arg is None for call in named for keyword in call.keywords)
