"""Round to nearest: the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def nearest_(model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Leaves every weight on the nearest level of the grid over its own minimum and maximum.

    That is how affine encoders start, so there is nothing left to set; `batches` are not needed.
    """
