"""Post-training methods, one a file, and the table that makes them known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_r2.ptq.nearest import nearest_

__all__ = ["PTQ_METHODS", "PTQMethod"]


@dataclass(frozen=True)
class PTQMethod:
    """A function that sets ranges and roundings on a prepared model, where it comes from, and whether it needs batches."""

    run: Callable[..., None]
    paper: str
    data_free: bool = False


PTQ_METHODS: dict[str, PTQMethod] = {
    "nearest": PTQMethod(nearest_, "round to nearest", data_free=True),
}
