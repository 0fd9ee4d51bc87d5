"""What a packed model is: widths, sizes and the policy for first and last layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_r2.coded import CODES, code_streams
from hf_r2.encoders.base import Encoded
from hf_r2.entropy import entropy
from hf_r2.layers import is_table, weight_layers
from hf_r2.packed_layers import encoded, packed_layers


def report(model: nn.Module) -> dict[str, Any]:
    """Sizes of a packed model, scales, zero points, palettes and adapters counted; weights shared by tied layers counted once.

    Keys: `bits_per_weight` (effective, over all packed weights), `bits_per_weight_all` (weights left in float counted
    with their own width), `size_bytes` (all tensors of the checkpoint), `float16_bytes`, `compression` (against float16),
    `storage` (of the config; sizes are those of entropy-coded tensors where it says so), `entropy` (of single codes, in bits
    per weight: what entropy-coded codes come close to; scales and palettes are not in it), `first_layer`, `last_layer`
    (name and bits, 16 or 32 if left in float), `policy`, `notes` (what folding and equalization did, what became of ReLU6,
    which pairs were left alone), `layers` (list of name, kind, shape, bits, dim (weights for each code), rank (of the
    adapter, 0 without one), entropy, bits_per_weight).

    Raises ValueError for a model that is not packed.
    """
    packed = packed_layers(model)
    if not packed:
        raise ValueError("report needs a packed model: call quantize(model, config) first")
    state_dict = model.state_dict()
    storage = getattr(_config(model), "storage", "packed")
    coded, streams = code_streams(model, state_dict) if storage == "entropy" else (state_dict, {})
    rows, seen = [], set()
    for name, module in packed.items():
        if id(module.weight_packed) in seen:
            continue
        seen.add(id(module.weight_packed))
        coded_sizes = {key: (length, state_dict[f"{name}.{key}"]) for key, length in streams.get(name, {}).items()}
        rows.append(_row(name, encoded(module), coded_sizes))
    kept = [
        (layer.weight.numel(), layer.weight.numel() * layer.weight.element_size() * 8)
        for layer in weight_layers(model)
    ]
    numel, stored = sum(r["numel"] for r in rows), sum(r["stored_bits"] for r in rows)
    size = checkpoint_bytes(model, coded)
    plain = 2 * (numel + _float_elements(model))
    first, last = _ends(model)
    return {
        "bits_per_weight": stored / max(numel, 1),
        "bits_per_weight_all": (stored + sum(b for _, b in kept)) / max(numel + sum(n for n, _ in kept), 1),
        "size_bytes": size,
        "float16_bytes": plain,
        "compression": plain / max(size, 1),
        "storage": storage,
        "entropy": sum(r["entropy"] * r["numel"] for r in rows) / max(numel, 1),
        "first_layer": first,
        "last_layer": last,
        "policy": _policy(first, last, rows),
        "notes": list((getattr(_config(model), "skeleton", None) or {}).get("notes", [])),
        "layers": rows,
    }


def _row(name: str, e: Encoded, coded: Mapping[str, tuple[int, Tensor]]) -> dict[str, Any]:
    """One layer; `coded`: bytes of the stream of each of its tensors that is entropy-coded, and that tensor."""
    count, bits = math.prod(e.weight_shape), e.stored_bits()
    for key, (length, tensor) in coded.items():
        bits += 8 * length - (e.codes.numel() * e.bits if key == CODES else 8 * tensor.numel() * tensor.element_size())
    kind = "palette" if e.centroids is not None else "affine"
    return {
        "name": name, "kind": kind, "shape": list(e.weight_shape), "bits": e.bits, "numel": count, "dim": e.dim,
        "rank": 0 if e.adapter is None else e.adapter.rank,
        "entropy": entropy(e.codes) * e.codes.numel() / max(count, 1),
        "stored_bits": bits, "bits_per_weight": bits / max(count, 1),
    }  # fmt: skip


def checkpoint_bytes(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> int:
    """Bytes of all tensors that are saved; what tied layers share counts once, tables that are made anew do not count."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    saved = (model.state_dict() if state_dict is None else state_dict).items()
    tensors = {t.data_ptr() or id(t): t for key, t in saved if key not in left_out}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _float_elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.is_floating_point())


def _config(model: nn.Module) -> Any:
    own = getattr(getattr(model, "config", None), "quantization_config", None)
    return own or model.__dict__.get("r2_quant_config")


def _ends(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last layer in the order of registration; tables come before them and are no input layers."""
    packed = packed_layers(model)
    kept = {layer.name: layer for layer in weight_layers(model, tied=True)}
    names = [n for n, m in model.named_modules() if n in packed or n in kept]
    names = [n for n in names if not is_table(model.get_submodule(n))] or names
    ends = []
    for name in (names[0], names[-1]):
        bits = encoded(packed[name]).bits if name in packed else kept[name].weight.element_size() * 8
        ends.append({"name": name, "bits": bits})
    return ends[0], ends[1]


def _policy(first: dict[str, Any], last: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    usual = max({r["bits"] for r in rows}, key=[r["bits"] for r in rows].count)
    if first["bits"] == usual and last["bits"] == usual:
        return f"first and last layers at {usual} bits, like the rest"
    ends = f"first layer ({first['name']}) at {first['bits']} bits, last ({last['name']}) at {last['bits']}"
    return f"{ends}, the rest at {usual}"
