"""Weight encoders, one a file, and the table that makes the trainable ones known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_r2.encoders.affine import Affine
from hf_r2.encoders.base import Encoded
from hf_r2.encoders.dkm import DKM, DKMOptions

__all__ = ["ENCODERS", "Affine", "Encoded", "EncoderRow"]


@dataclass(frozen=True)
class EncoderRow:
    """An encoder class, where it comes from, and the frozen options it takes (checked where they are made)."""

    build: Callable[..., nn.Module]
    paper: str
    options: Callable[..., object]


ENCODERS: dict[str, EncoderRow] = {
    "dkm": EncoderRow(DKM, "arXiv:2108.12659", DKMOptions),
}
