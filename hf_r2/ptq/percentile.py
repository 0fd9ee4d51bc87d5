"""Ranges cut at a quantile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_r2.attach import prepared_encoders
from hf_r2.ranges import percentile_range


def percentile_(
    model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None, *, percentile: float = 0.9999
) -> None:
    """Gives every weight the range between its quantiles 1 - percentile and percentile (see `percentile_range`)."""
    for weight, encoder in prepared_encoders(model):
        encoder.set_range_(*percentile_range(weight, encoder.grid, encoder.axis, percentile=percentile))
