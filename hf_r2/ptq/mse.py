"""Ranges of least error, searched on a grid of candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_r2.attach import prepared_encoders
from hf_r2.ranges import mse_range


def mse_(
    model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None, *, p: float = 2.4, search: str = "auto"
) -> None:
    """Gives every weight the range with the least mean |w - w_hat|**p (BRECQ, arXiv:2102.05426; see `mse_range`)."""
    for weight, encoder in prepared_encoders(model):
        encoder.set_range_(*mse_range(weight, encoder.grid, encoder.axis, p=p, search=search))
