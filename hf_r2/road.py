"""The road from a float model to a packed one, in place: attach, set, calibrate, pack; and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_r2.attach import (
    attach_,
    detach_,
    encoded_weights,
    plain_inputs_,
    prepared_layers,
    settle_inputs_,
)
from hf_r2.batches import Batches, check_accepted, checked, warn_of_fewer
from hf_r2.calibration import await_ranges_, calibrate_, make_dynamic_, range_by_statistics_, static_quantizers
from hf_r2.dressed import float_weights
from hf_r2.float_passes import apply_passes_, undo_passes_
from hf_r2.graph import example_inputs, read_graph
from hf_r2.graph.statistics import input_statistics
from hf_r2.layers import check_globs, first_and_last, weight_layers
from hf_r2.names import relative_name
from hf_r2.packed_layers import Layout, dequantize_layer_, layout_of, pack_layer_, packed_layers
from hf_r2.ptq import PTQ_METHODS
from hf_r2.quant_config import R2QuantConfig
from hf_r2.tied import retie, tied_pairs

SAMPLES = 1024  # calibration samples that are taken of the batches where the options name no number


def prepare_(model: nn.Module, config: R2QuantConfig, skeleton: dict[str, Any] | None = None) -> None:
    """Attaches encoders and input quantizers and notes the recipe on the model, in place."""
    names = [layer.name for layer in weight_layers(model, tied=True)]
    check_globs(config.skip, names, "skip")
    check_globs(config.overrides, names, "overrides")
    stored = copy.deepcopy(config)
    stored.drop_run_options_()
    stored.stage = "prepared"
    stored.skeleton = skeleton or {}
    if config.first_last_bits is not None:
        for name in first_and_last(model):
            stored.overrides[name] = {**stored.overrides.get(name, {}), **stored.ends()}
    owners = attach_(model, stored.spec_for)
    names_in_config = {name: relative_name(model, name) for name in owners}
    stored.layers = {names_in_config[name]: {"encoder_of": names_in_config[owner]} for name, owner in owners.items()}
    model.__dict__["r2_quant_config"] = stored
    if isinstance(model, PreTrainedModel):
        model.config.quantization_config = stored  # so that from_pretrained prepares a training checkpoint again


def quantize_(model: nn.Module, config: R2QuantConfig, batches: Batches | None) -> R2QuantConfig:
    """Float model to packed layers, in place; returns the config to store with them."""
    if config.needs_batches and batches is None:
        raise ValueError(f"batches are needed: {config.needs_batches}")
    if config.method not in PTQ_METHODS:  # a trained encoder, used as it starts
        prepare_(model, config)
        plain_inputs_(model)
        await_ranges_(model)
        calibrate_(model, None if batches is None else checked(batches, SAMPLES))
        return pack_(model)
    method = PTQ_METHODS[config.method]
    passes, options = config.split_options()
    data = None if batches is None else checked(batches, options.get("samples", SAMPLES), labels=method.labels)
    if data is not None:
        check_accepted(model, data)
        warn_of_fewer(data, options.get("samples", 0))  # what is not asked for is a limit, no wish
    if config.granularity == "per_tensor":
        passes = replace(passes, **{k: v for k, v in method.per_tensor_passes.items() if getattr(passes, k) is None})
    skeleton = apply_passes_(model, passes, data[0] if data else None)
    if method.per_tensor_passes and not passes.equalize:
        skeleton.setdefault("notes", []).append("not equalized: equal ranges serve grids per tensor")
    prepare_(model, config, skeleton)
    await_ranges_(model)
    method.run(model, data, **options)
    if data is None and method.data_free_ranges:
        _range_without_data_(model)
    calibrate_(model, data, method.act_rule)
    return pack_(model)


def _range_without_data_(model: nn.Module) -> None:
    if static_quantizers(model):
        with float_weights(model):
            range_by_statistics_(model, input_statistics(read_graph(model, example_inputs(model)), model))
        make_dynamic_(model)


def pack_(model: nn.Module) -> R2QuantConfig:
    """Prepared layers to packed layers, in place; returns the config to store with them.

    Raises ValueError for a model that was never prepared.
    """
    layers = prepared_layers(model)
    if not layers:
        raise ValueError(
            "nothing to convert: call prepare(model, config) and train, or quantize(model, config) at once"
        )
    settle_inputs_(model)
    config = copy.deepcopy(model.__dict__.get("r2_quant_config") or stored_config(model))
    pairs = tied_pairs(model) if isinstance(model, PreTrainedModel) else {}
    encoded = encoded_weights(model)
    shared: dict[int, nn.Parameter] = {}
    layouts: dict[str, Layout] = {}
    for layer in layers:
        result, owner = encoded[layer.name], id(encoded[layer.name])
        layouts[layer.name] = layout_of(result, layer.channel_axis, layer.module)
        detach_(layer.module)
        pack_layer_(layer.module, result, layouts[layer.name], shared.get(owner))
        shared[owner] = layer.module._parameters["weight_packed"]  # type: ignore[assignment]
    if isinstance(model, PreTrainedModel):
        retie(model, pairs)
    config.layers = {relative_name(model, name): layout.to_dict() for name, layout in layouts.items()}
    config.stage = "packed"
    model.__dict__.pop("r2_quant_config", None)
    return config


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turns a packed model back into a plain float one with the quantized values, in place; ties are kept."""
    pairs = tied_pairs(model) if isinstance(model, PreTrainedModel) else {}
    skeleton = stored_config(model).skeleton
    shared: dict[int, nn.Parameter] = {}
    for module in packed_layers(model).values():
        packed = module._parameters["weight_packed"]
        if id(packed) not in shared:
            value = module.weight.detach().clone()  # type: ignore[operator,union-attr]
            shared[id(packed)] = nn.Parameter(value.to(dtype or value.dtype))
        dequantize_layer_(module, shared[id(packed)])
    undo_passes_(model, skeleton)
    if isinstance(model, PreTrainedModel):
        retie(model, pairs)


def stored_config(model: nn.Module) -> R2QuantConfig:
    """The recipe and the layers of a prepared or packed model; that of a transformers model is the one it saves."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None) or model.__dict__.get(
        "r2_quant_config"
    )
    return stored if isinstance(stored, R2QuantConfig) else R2QuantConfig(**(stored or {}))
