"""prepare, quantize, convert, train_adapters_: what a user calls on a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeVar

from torch import nn

from hf_r2.batches import Batches
from hf_r2.checkpoint import finish_packed_
from hf_r2.encoders import ENCODERS
from hf_r2.lowrank import FLOAT_BITS
from hf_r2.names import relative_name
from hf_r2.packed_layers import adapter_of, is_packed, packed_layers, unpack_weights_
from hf_r2.quant_config import R2QuantConfig
from hf_r2.road import pack_, prepare_, quantize_, stored_config

M = TypeVar("M", bound=nn.Module)


def prepare(model: M, config: R2QuantConfig) -> M:
    """Attaches trainable encoders (and input quantizers) to `model`, in place, and returns it; train it with any Trainer.

    The state dict keeps the keys `weight` and `bias`; encoders add keys of their own below the same layer, so every
    checkpoint that is written while training can be resumed and loaded.

    Raises ValueError for a method that is not trained (see `ENCODERS`), for globs that match no layer, and as `quantize`
    does for weights that cannot be quantized.
    """
    if config.method not in ENCODERS:
        raise ValueError(
            f"prepare is for the methods that are trained ({', '.join(ENCODERS)}); {config.method!r} works after training: "
            "call quantize(model, config, batches)"
        )
    prepare_(model, config)
    return model


def quantize(model: M, config: R2QuantConfig, batches: Batches | None = None, *, inplace: bool = False) -> M:
    """A packed copy of the float `model`, which itself stays untouched unless `inplace` asks for no copy.

    `batches` are keyword dicts for `forward` (a DataLoader, a list); they are needed for static activation ranges and by
    the methods that read layer inputs; the first 1,024 samples are taken (`samples` of the methods that have the option).
    `hf_r2.report.report(packed)` says what came out.

    Raises ValueError for missing or rejected batches, globs that match no layer, a model without a float weight layer,
    and NaN or infinity in a weight (the layer is named).
    """
    if any(is_packed(module) for module in model.modules()):
        raise ValueError("the model is packed already; quantize starts from a float model (see model.dequantize())")
    model = model if inplace else copy.deepcopy(model)
    finish_packed_(model, quantize_(model, config, batches))
    return model


def convert(model: M) -> M:
    """Turns a prepared `model` into a packed one, in place, and returns it.

    Raises ValueError for a model that was never prepared, and for NaN or infinity in a weight (the layer is named).
    """
    finish_packed_(model, pack_(model))
    return model


def train_adapters_(model: nn.Module) -> None:
    """Freezes a packed `model` but for its low-rank adapters, which become trainable, in place; train it with any Trainer.

    From then on adapters are stored as float16, also those that were quantized to fewer bits. What else is to be trained
    (a fresh head) is unfrozen by `requires_grad_(True)` afterwards.

    Raises ValueError for a model without an adapter.
    """
    adapters = {n: a for n, m in packed_layers(model).items() if (a := adapter_of(m)) is not None}
    if not adapters:
        raise ValueError("the model has no low-rank adapter to train: quantize it with method='cora'")
    config = stored_config(model)
    model.requires_grad_(False)
    unpacked = False
    for name, adapter in adapters.items():
        adapter.train_()
        module = model.get_submodule(name)
        unpacked |= module._buffers.get("weight_decoded") is not None
        layout = replace(module.__dict__["weight_layout"], adapter_bits=FLOAT_BITS)
        module.__dict__["weight_layout"] = layout
        config.layers[relative_name(model, name)] = layout.to_dict()
    unpack_weights_(model, unpacked)
