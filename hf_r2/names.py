"""Names of modules that are the same in a base model and in one with a head."""

from __future__ import annotations

from torch import nn


def relative_name(model: nn.Module, name: str) -> str:
    """The module's name without the prefix of the base model: the same in a base model and in one with a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name
