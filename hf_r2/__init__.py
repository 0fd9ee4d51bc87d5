"""hf_r2: models that survive 1- to 4-bit weights. Importing it registers the quantizer "hf_r2" with transformers."""

from hf_r2.checkpoint import R2HfQuantizer
from hf_r2.encoders import ENCODERS
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
    "l_inf",
    "margin",
    "packed_in_memory",
    "prepare",
    "quantize",
    "soft_min_max",
    "train_adapters_",
]
