"""hf_r2: models that survive 1- to 4-bit weights. Importing it registers the quantizer "hf_r2" with transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_r2.registration import register as _register

if TYPE_CHECKING:
    from hf_r2.checkpoint import R2HfQuantizer
    from hf_r2.encoders import ENCODERS
    from hf_r2.kernels import kernels_of, use_kernels_
    from hf_r2.losses import RANGE_LOSSES, RangeLoss, l_inf, margin, soft_min_max
    from hf_r2.packed_layers import packed_in_memory
    from hf_r2.ptq import PTQ_METHODS
    from hf_r2.quant_config import R2QuantConfig
    from hf_r2.trainer import R2Seq2SeqTrainer, R2Trainer
    from hf_r2.training_args import R2Seq2SeqTrainingArguments, R2TrainingArguments
    from hf_r2.verbs import convert, prepare, quantize, train_adapters_

__version__ = "0.1.0"

__all__ = [
    "ENCODERS",
    "PTQ_METHODS",
    "RANGE_LOSSES",
    "R2HfQuantizer",
    "R2QuantConfig",
    "R2Seq2SeqTrainer",
    "R2Seq2SeqTrainingArguments",
    "R2Trainer",
    "R2TrainingArguments",
    "RangeLoss",
    "convert",
    "kernels_of",
    "l_inf",
    "margin",
    "packed_in_memory",
    "prepare",
    "quantize",
    "soft_min_max",
    "train_adapters_",
    "use_kernels_",
]

# Where each public name is: imported when it is first asked for, since Trainer alone takes as long as torch.
_PLACES = {
    "checkpoint": ("R2HfQuantizer",),
    "encoders": ("ENCODERS",),
    "kernels": ("kernels_of", "use_kernels_"),
    "losses": ("RANGE_LOSSES", "RangeLoss", "l_inf", "margin", "soft_min_max"),
    "packed_layers": ("packed_in_memory",),
    "ptq": ("PTQ_METHODS",),
    "quant_config": ("R2QuantConfig",),
    "trainer": ("R2Seq2SeqTrainer", "R2Trainer"),
    "training_args": ("R2Seq2SeqTrainingArguments", "R2TrainingArguments"),
    "verbs": ("convert", "prepare", "quantize", "train_adapters_"),
}
_HOME = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_r2' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hf_r2.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
