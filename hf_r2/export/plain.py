"""Packed models as checkpoints that load without hf_r2: float weights, or the packed linear layers that transformers has.

The latter is its format "gemma" (transformers 5.23 and newer; the classes serve any model): linear layers and embeddings with
integer weights of 2, 4 or 8 bits and a scale for each output channel, zero in the middle.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import quantization_config as formats

from hf_r2.attach import refuse_prepared
from hf_r2.encoders.base import Encoded
from hf_r2.packed_layers import adapter_of, encoded, packed_layers
from hf_r2.packing import pack_bits
from hf_r2.report import checkpoint_bytes

CONTAINERS = (2, 4, 8)  # widths of the format "gemma": integers from -2**(bits - 1) on
ROUNDED = "its inputs are rounded to {} bits in this model, and are float in the exported one"


def to_float(model: PreTrainedModel, folder: str | Path) -> dict[str, Any]:
    """Saves the decoded weights of a packed `model` as a float checkpoint that transformers loads by itself.

    Returns a dict: `size_bytes`, `layers` {name: {"mode": "float"}}, `float_layers` {name: why}, `notes` [what the checkpoint
    does not hold: the rounding of layer inputs]. Raises ValueError for a model that is not packed.
    """
    layers = _packed(model)
    plain = _float_copy(model)
    plain.save_pretrained(folder)
    return {
        "size_bytes": checkpoint_bytes(plain), "layers": {name: {"mode": "float"} for name in layers},
        "float_layers": dict.fromkeys(layers, "decoded"), "notes": _rounded_inputs(layers),
    }  # fmt: skip


def to_native(model: PreTrainedModel, folder: str | Path) -> dict[str, Any]:
    """Saves a packed `model` in transformers' own integer format; what that cannot hold goes in as float weights.

    Weights are the same to the bit: widths in between go into the next wider integers. Returns a dict: `size_bytes`, `layers`
    {name: {"mode": "integer" or "float", "bits"}}, `float_layers` {name: why}, `notes`.

    Raises ValueError for a model that is not packed, or without a layer that fits; ImportError for transformers older than
    5.23.
    """
    if not hasattr(formats, "GemmaQuantizationConfig"):
        raise ImportError(
            "the format 'native' came with transformers 5.23: pip install --upgrade 'transformers>=5.23' (or export 'float')"
        )
    layers = _packed(model)
    tied = _tied(model)
    integers, reasons = {}, {}
    for name, module in layers.items():
        found = "its weight is shared with another layer" if name in tied else _integers(model, name, module)
        if isinstance(found, str):
            reasons[name] = found
        else:
            integers[name] = found
    if not integers:
        raise ValueError(f"no layer fits transformers' own format ({_first(reasons)}): export 'float'")
    plain = _float_copy(model)
    plain.config.quantization_config = _config(plain, {name: bits for name, (_, _, bits) in integers.items()})
    state_dict = plain.state_dict()
    for name, found in integers.items():
        del state_dict[f"{name}.weight"]
        state_dict |= _stored(plain.get_submodule(name), name, *found)
    size = checkpoint_bytes(plain, state_dict)
    plain.save_pretrained(folder, state_dict=state_dict)  # empties the state dict
    listed = {
        name: {"mode": "integer", "bits": integers[name][2]} if name in integers else {"mode": "float"}
        for name in layers
    }
    return {
        "size_bytes": size, "layers": listed, "float_layers": reasons,
        "notes": _rounded_inputs(layers),
    }  # fmt: skip


def _packed(model: nn.Module) -> dict[str, nn.Module]:
    refuse_prepared(model)
    layers = packed_layers(model)
    if not layers or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"export needs a packed transformers model, got a {type(model).__name__} with {len(layers)} packed layers: call "
            "hf_r2.quantize(model, config) first"
        )
    return layers


def _float_copy(model: PreTrainedModel) -> PreTrainedModel:
    plain = copy.deepcopy(model)
    plain.__dict__.pop("save_pretrained", None)  # it is bound to the model that was copied
    return plain.dequantize()  # type: ignore[return-value]


def _rounded_inputs(layers: dict[str, nn.Module]) -> list[str]:
    return [
        f"{name}: {ROUNDED.format(module.__dict__['weight_layout'].act_bits)}"
        for name, module in layers.items()
        if module.__dict__["weight_layout"].act_bits is not None and "input_quantizer" in module._modules
    ]


def _tied(model: nn.Module) -> set[str]:
    by_tensor: dict[int, list[str]] = {}
    for name, module in packed_layers(model).items():
        by_tensor.setdefault(id(module.weight_packed), []).append(name)
    return {name for names in by_tensor.values() if len(names) > 1 for name in names}


def _integers(model: PreTrainedModel, name: str, module: nn.Module) -> tuple[Tensor, Tensor, int] | str:
    """Signed weights (int8), their scales [out, 1] and the width that holds them, or why there are none."""
    base = type(module).__bases__[1]  # behind the mixin of a dressed class
    if base not in (nn.Linear, nn.Embedding):
        return f"the format has no {base.__name__}"
    if any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in model._keep_in_fp32_modules or ()):
        return "transformers keeps this layer in float"
    if adapter_of(module) is not None:
        return "the format has no low-rank adapter"
    e: Encoded = encoded(module)
    if e.centroids is not None or e.scale is None or e.zero_point is None:
        return "a palette's levels are no integers"
    # One bit, symmetric: the zero point is between the codes, and the integers are -1 and 1 in steps of half a scale.
    half = 2 if e.symmetric and e.bits == 1 else 1
    whole = (half * (e.codes.float() - e.zero_point)).to(torch.int16)
    lowest, highest = int(whole.min()), int(whole.max())
    for bits in CONTAINERS:
        if -(2 ** (bits - 1)) <= lowest and highest < 2 ** (bits - 1):
            scale = (e.scale / half).expand(whole.shape[0], 1).contiguous()
            return whole.to(torch.int8), scale, bits
    return (
        f"its integers reach from {lowest} to {highest}, the format's from -128 to 127: quantize with symmetric=True"
    )


def _config(model: PreTrainedModel, bits: dict[str, int]) -> dict[str, Any]:
    """The format's config; every name is a pattern that matches this layer alone, also below a base model's prefix."""
    others = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and n not in bits]
    return {
        "quant_method": "gemma",
        "num_bits": 8,
        "quantize_embeddings": any(isinstance(model.get_submodule(name), nn.Embedding) for name in bits),
        "module_quant_configs": {rf"(?:^|\.){re.escape(n)}$": {"num_bits": b} for n, b in bits.items() if b != 8},
        "modules_to_not_convert": [rf"(?:.*\.)?{re.escape(name)}$" for name in others],
    }


def _stored(module: nn.Module, name: str, weight: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """The tensors of a layer by their keys; integers below 8 bits are packed row by row, the first in the lowest bits."""
    if bits < 8:
        codes = torch.nn.functional.pad(weight + 2 ** (bits - 1), (0, -weight.shape[1] % (8 // bits)))
        weight = pack_bits(codes.to(torch.uint8), bits).view(weight.shape[0], -1)
    if isinstance(module, nn.Embedding):
        return {f"{name}.embedding_quantized": weight, f"{name}.embedding_scale": scale}
    off = {
        f"{name}.{side}_activation_scale": torch.tensor(0.0) for side in ("input", "output")
    }  # 0: inputs are not rounded
    return {f"{name}.weight": weight, f"{name}.weight_scale": scale, **off}


def _first(reasons: dict[str, str]) -> str:
    name = next(iter(reasons))
    return f"{name}: {reasons[name]}"
