"""Weight encoders, one a file, and the table that makes the trainable ones known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_r2.encoders.affine import Affine
from hf_r2.encoders.base import Encoded
from hf_r2.encoders.dkm import DKM, DKMOptions
from hf_r2.encoders.dorefa import DoReFa, DoReFaOptions, PACTOptions
from hf_r2.encoders.lsq import LSQ, LSQOptions
from hf_r2.encoders.trained_inputs import ClippedInput, LearnedStepInput
from hf_r2.spec import LayerSpec

__all__ = ["ENCODERS", "Affine", "Encoded", "EncoderRow"]


@dataclass(frozen=True)
class EncoderRow:
    """An encoder class, its source, the frozen options it takes (checked where they are made), and the quantizer of static
    input ranges that is trained beside it."""

    build: Callable[..., nn.Module]
    paper: str
    options: Callable[..., object]
    inputs: Callable[[LayerSpec], nn.Module]


ENCODERS: dict[str, EncoderRow] = {
    "dorefa": EncoderRow(DoReFa, "arXiv:1606.06160", DoReFaOptions, ClippedInput),
    "pact": EncoderRow(DoReFa, "arXiv:1805.06085", PACTOptions, ClippedInput),
    "lsq": EncoderRow(LSQ, "arXiv:1902.08153", LSQOptions, LearnedStepInput),
    "dkm": EncoderRow(DKM, "arXiv:2108.12659", DKMOptions, LearnedStepInput),
}
