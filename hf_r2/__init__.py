"""hf_r2: models that survive 1- to 4-bit weights. Importing it registers the quantizer "hf_r2" with transformers."""

from hf_r2.checkpoint import R2HfQuantizer
from hf_r2.encoders import ENCODERS
from hf_r2.packed_layers import packed_in_memory
from hf_r2.ptq import PTQ_METHODS
from hf_r2.quant_config import R2QuantConfig
from hf_r2.verbs import convert, prepare, quantize

__all__ = [
    "ENCODERS",
    "PTQ_METHODS",
    "R2HfQuantizer",
    "R2QuantConfig",
    "convert",
    "packed_in_memory",
    "prepare",
    "quantize",
]
