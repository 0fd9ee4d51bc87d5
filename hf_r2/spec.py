"""What is to be done to one layer, as a value that cannot be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_r2.grid import Grid, check_bits

GRANULARITIES = ("per_tensor", "per_channel")
ACT_RANGES = ("static", "dynamic")


@dataclass(frozen=True)
class LayerSpec:
    """Method and widths for one layer; `act_bits` None leaves the inputs in float.

    Raises ValueError for a width outside 1 to 8 (activations: 2 to 8), or an unknown granularity or activation range.
    """

    method: str = "nearest"
    weight_bits: int = 4
    granularity: str = "per_channel"
    symmetric: bool = True
    act_bits: int | None = None
    act_range: str = "static"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        if self.act_bits is not None:
            check_bits(self.act_bits, "act_bits")
            if self.act_bits < 2:
                raise ValueError(f"act_bits must be 2 to 8 or None, got {self.act_bits}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; got {self.granularity!r}")
        if self.act_range not in ACT_RANGES:
            raise ValueError(f"act_range must be one of {', '.join(ACT_RANGES)}; got {self.act_range!r}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be true or false, got {self.symmetric!r}")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a mapping of option names to values, got {self.options!r}")

    @property
    def grid(self) -> Grid:
        """The grid of the weight."""
        return Grid(self.weight_bits, self.symmetric)
