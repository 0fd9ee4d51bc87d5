"""Attaching weight encoders and input quantizers to the layers of a model, and taking them off."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hf_r2.dressed import ENCODER, FLOAT_BIAS, EncodedWeight, dress, is_prepared, undress
from hf_r2.encoders import ENCODERS, Affine, Encoded
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.encoders.trained_inputs import TrainedInput
from hf_r2.layers import WeightLayer, is_table, weight_layers
from hf_r2.spec import LayerSpec

SpecFor = Callable[[str], LayerSpec | None]


def attach_(model: nn.Module, spec_for: SpecFor) -> dict[str, str]:
    """Gives every layer that `spec_for` (by name) has a spec for a weight encoder and, if asked, an input quantizer.

    Layers that share a weight share one encoder, which is registered in the first of them. Returns {layer: the layer
    that owns its encoder}, tied ones included.

    Raises ValueError for a model that is prepared already, for one without any layer to quantize, for tied layers with
    different specs, and for NaN or infinity in a weight (the layer is named).
    """
    layers = weight_layers(model, tied=True)
    if any(is_prepared(layer.module) for layer in layers):
        raise ValueError("the model is prepared already: convert it, or start again from the float model")
    specs = {layer.name: spec for layer in layers if (spec := spec_for(layer.name)) is not None}
    if not specs:
        raise ValueError(f"nothing to quantize: the model has {len(layers)} float weight layers, and none is selected")
    owners: dict[str, str] = {}
    for group in _groups(layers):
        chosen = [layer for layer in group if layer.name in specs]
        if chosen and len(chosen) < len(group):
            raise ValueError(f"{', '.join(layer.name for layer in group)} share one weight: skip all of them, or none")
        if any(specs[layer.name] != specs[group[0].name] for layer in chosen):
            raise ValueError(
                f"{', '.join(layer.name for layer in group)} share one weight but have different settings"
            )
        owners |= {layer.name: group[0].name for layer in chosen}
    attach_shared_(model, specs, owners)
    for name in owners:
        dress(model.get_submodule(name), EncodedWeight)
    return owners


def attach_shared_(model: nn.Module, specs: Mapping[str, LayerSpec], owners: Mapping[str, str]) -> None:
    """Registers encoders and input quantizers, in place; the layers still show their bare parameter.

    `owners` says which layers share an encoder: while transformers loads a checkpoint, ties are not there to be seen.
    """
    layers = {layer.name: layer for layer in weight_layers(model, tied=True)}
    for name, owner in sorted(owners.items(), key=lambda pair: pair[0] != pair[1]):  # owners first
        layer, spec = layers[name], specs[name]
        if name == owner:
            _check_finite(layer)
            build = ENCODERS[spec.method].build if spec.method in ENCODERS else Affine
            encoder = build(layer.weight, spec, layer.channel_axis)
            encoder.train(layer.module.training)
            encoder.__dict__["layer"] = name  # for messages
            layer.module.add_module("weight_encoder", encoder.to(layer.weight.device))
        # Tied layers see the owner's encoder without registering it again: its state is in the state dict once.
        object.__setattr__(layer.module, ENCODER, model.get_submodule(owner).weight_encoder)
        if spec.act_bits is not None and not is_table(layer.module):
            quantizer = _input_quantizer(spec).train(layer.module.training)
            layer.module.add_module("input_quantizer", quantizer.to(layer.weight.device))


def _input_quantizer(spec: LayerSpec) -> nn.Module:
    assert spec.act_bits is not None
    if spec.act_range == "static" and spec.method in ENCODERS:
        return ENCODERS[spec.method].inputs(spec)
    return InputQuantizer(spec.act_bits, spec.act_range)


def plain_inputs_(model: nn.Module) -> None:
    """Puts calibrated input quantizers in the place of those that are trained, in place: for use without training."""
    for layer in prepared_layers(model):
        trained = layer.module._modules.get("input_quantizer")
        if isinstance(trained, TrainedInput):
            layer.module.add_module("input_quantizer", InputQuantizer(trained.grid.bits).to(layer.weight.device))


def settle_inputs_(model: nn.Module) -> None:
    """Puts plain input quantizers that compute the same in the place of trained ones, in place.

    Raises ValueError, naming the layer, where no range is known yet; then nothing is changed.
    """
    settled = []
    for layer in prepared_layers(model):
        trained = layer.module._modules.get("input_quantizer")
        if isinstance(trained, TrainedInput):
            try:
                settled.append((layer.module, trained.settled()))
            except ValueError as error:
                raise ValueError(f"layer {layer.name!r}: {error}; train the model before convert") from error
    for module, quantizer in settled:
        module.add_module("input_quantizer", quantizer)


def _groups(layers: list[WeightLayer]) -> list[list[WeightLayer]]:
    """The layers, those that share a weight together."""
    groups: dict[int, list[WeightLayer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.weight), []).append(layer)
    return list(groups.values())


def show_encoded_(model: nn.Module) -> None:
    """Lets the layers of a model after `attach_shared_` compute with their encoded weight, in place."""
    for module in model.modules():
        if ENCODER in module.__dict__ and not is_prepared(module):
            dress(module, EncodedWeight)


def _check_finite(layer: WeightLayer) -> None:
    weight = layer.weight.detach()
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {layer.name!r} holds NaN or infinity; it cannot be quantized")


def prepared_layers(model: nn.Module) -> list[WeightLayer]:
    """The prepared layers of `model`, tied ones included."""
    return [layer for layer in weight_layers(model, tied=True) if is_prepared(layer.module)]


def refuse_prepared(model: nn.Module) -> None:
    """Raises ValueError for a prepared model, where a packed one is wanted: it may be half trained."""
    if prepared_layers(model):
        raise ValueError("the model is prepared, and may be half trained: call hf_r2.convert(model) when it is done")


def encoder_of(layer: WeightLayer) -> nn.Module:
    """The weight encoder in front of a prepared layer."""
    return layer.module.__dict__[ENCODER]


def prepared_encoders(model: nn.Module) -> list[tuple[nn.Parameter, Affine]]:
    """The float weights of a prepared model with the affine encoder in front of each; shared ones once."""
    found: dict[int, tuple[nn.Parameter, Affine]] = {}
    for layer in prepared_layers(model):
        encoder = encoder_of(layer)
        if isinstance(encoder, Affine):
            found.setdefault(id(encoder), (layer.weight, encoder))
    return list(found.values())


def replace_encoder_(model: nn.Module, layer: WeightLayer, encoder: nn.Module) -> None:
    """Puts another encoder in front of a prepared layer and of those that share its weight, in place."""
    encoder.train(layer.module.training)
    for tied in prepared_layers(model):
        if tied.weight is layer.weight:
            if "weight_encoder" in tied.module._modules:  # the one that owns the shared encoder
                tied.module._modules["weight_encoder"] = encoder
            object.__setattr__(tied.module, ENCODER, encoder)


@torch.no_grad()
def encoded_weights(model: nn.Module) -> dict[str, Encoded]:
    """{layer name: Encoded} of a prepared model; layers that share a weight share one `Encoded`."""
    done: dict[int, Encoded] = {}
    result: dict[str, Encoded] = {}
    for layer in prepared_layers(model):
        if id(layer.weight) not in done:
            _check_finite(layer)
            done[id(layer.weight)] = encoder_of(layer).encode(layer.weight)  # type: ignore[operator]
        result[layer.name] = done[id(layer.weight)]
    return result


def detach_(module: nn.Module) -> None:
    """Takes the encoder off a prepared layer, in place; its float weight stays."""
    undress(module)
    module._modules.pop("weight_encoder", None)
    module.__dict__.pop(ENCODER, None)
    module.__dict__.pop(FLOAT_BIAS, None)
