"""Packed and prepared models in `save_pretrained` and `from_pretrained`: the transformers quantizer "hf_r2"."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from hf_r2.attach import attach_shared_, show_encoded_
from hf_r2.coded import await_streams_, code_streams, decode_streams_
from hf_r2.direct import fill_, is_direct, release_
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.float_passes import build_skeleton_
from hf_r2.integrity import checksums, verify
from hf_r2.layers import is_table, is_weight_layer, weight_layers
from hf_r2.names import relative_name
from hf_r2.packed_layers import STATE, Layout, adapter_of, build_packed_, packed_layers, unpack_weights_
from hf_r2.quant_config import R2QuantConfig
from hf_r2.road import dequantize_, quantize_
from hf_r2.saving import save_beside
from hf_r2.tied import retie, tied_pairs


class R2HfQuantizer(HfQuantizer):
    """Puts packed layers into the skeleton, so that a checkpoint's codes have a place to go; quantizes float ones."""

    quantization_config: R2QuantConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses, before anything is loaded, to quantize while loading where batches are needed."""
        reason = self.quantization_config.needs_batches
        if not self.pre_quantized and reason:
            raise ValueError(
                f"from_pretrained cannot quantize here without batches: {reason}. Load the float model and call "
                "hf_r2.quantize(model, config, batches)"
            )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Iterable[str] | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> None:
        if not self.pre_quantized or self.quantization_config.stage == "recipe":
            return
        shapes, stored = verify(checkpoint_files or [], is_direct)
        build_skeleton_(model, self.quantization_config.skeleton)
        if self.quantization_config.stage == "prepared":
            _attach_prepared_(model, self.quantization_config)
            return
        pairs = tied_pairs(model)
        for name, layout in _layouts(model, self.quantization_config, shapes).items():
            module = model.get_submodule(name)
            build_packed_(module, layout, dtype or torch.get_default_dtype())
            await_streams_(module, name)
            if layout.act_bits is not None and not is_table(module):
                module.add_module("input_quantizer", InputQuantizer(layout.act_bits, layout.act_range))
        _check_shapes(model, shapes)
        retie(model, pairs)
        if device_map is None or (isinstance(device_map, dict) and {str(d) for d in device_map.values()} == {"cpu"}):
            fill_(model, stored)  # elsewhere transformers places them

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        stage = self.quantization_config.stage
        if stage == "packed" and self.pre_quantized:
            release_(model)
            _restore_dtypes(model)
            _check_loaded(model)
            decode_streams_(model)
            finish_packed_(model, self.quantization_config)
        elif stage == "prepared":  # trained further as a float model: hf_quantizer would keep Trainer from saving it
            show_encoded_(model)
            self.remove_quantization_config(model)
            model.config.quantization_config = self.quantization_config
        else:
            finish_packed_(model, quantize_(model, self.quantization_config, None))

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """The state dict to save, and the checksums that go into the header of each file.

        Notes on the config, which transformers saves next, which tensors are entropy-coded.
        """
        state_dict, streams, config = model.state_dict(), {}, self.quantization_config
        if config.storage == "entropy":
            state_dict, streams = code_streams(model, state_dict)
        for name in packed_layers(model):
            layer = config.layers[relative_name(model, name)]
            layer.pop("streams", None)
            layer |= {"streams": streams[name]} if name in streams else {}
        return state_dict, checksums(state_dict)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # config.json holds its name
        model.__dict__.pop("save_pretrained", None)
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """What is left in float (norms, biases, a fresh head) can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks for this one too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed layers are ordinary torch code."""
        return True


def _attach_prepared_(model: nn.Module, config: R2QuantConfig) -> None:
    here = {relative_name(model, layer.name): layer.name for layer in weight_layers(model, tied=True)}
    owners: dict[str, str] = {}
    for name, fields in config.layers.items():
        if name in here:  # layers of a head that this model lacks are left out
            owners[here[name]] = here.get(fields.get("encoder_of", name), here[name])
    specs = {name: spec for name in owners if (spec := config.spec_for(name)) is not None}
    if set(specs) != set(owners):
        raise ValueError(f"config.json skips layers that it lists as prepared: {', '.join(set(owners) - set(specs))}")
    attach_shared_(model, specs, owners)


def _layouts(model: nn.Module, config: R2QuantConfig, shapes: Mapping[str, Any]) -> dict[str, Layout]:
    """Layouts by the names of this model; layers of a head that it lacks are left out.

    Raises ValueError for a layer that is neither in the model nor in the checkpoint, and for fields that are not known.
    """
    here = {relative_name(model, name): name for name, _ in model.named_modules()}
    stored = {
        relative_name(model, key.removesuffix(".weight_packed")) for key in shapes if key.endswith(".weight_packed")
    }
    layouts = {}
    for name, fields in config.layers.items():
        try:
            layout = Layout(**fields)
        except TypeError as error:
            raise ValueError(
                f"config.json describes layer {name!r} with fields this hf_r2 does not know: {error}"
            ) from error
        if name not in here:
            # A layer of a head that this model lacks. transformers renames the layers of some models as it saves (ViT):
            # then the file has codes that no layer here accounts for, and the name tells nothing.
            if name in stored or stored - set(here) or not shapes:
                continue
            raise ValueError(f"config.json names layer {name!r}, which neither the model nor the checkpoint has")
        layouts[here[name]] = layout
    _check_weights(layouts, model)
    return layouts


def _check_weights(layouts: Mapping[str, Layout], model: nn.Module) -> None:
    for name in layouts:
        module = model.get_submodule(name)
        if not is_weight_layer(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"config.json names layer {name!r}, a {type(module).__name__} in {type(model).__name__}: only linear, "
                "convolution and embedding layers can be packed"
            )


def _check_loaded(model: nn.Module) -> None:
    """Raises ValueError where codes did not come from the checkpoint.

    transformers fills what is missing with whatever the memory held, and marks what it did load.
    """
    for name, module in packed_layers(model).items():
        if not getattr(module.weight_packed, "_is_hf_initialized", False):
            raise ValueError(f"the checkpoint lacks the codes of layer {name!r}, which config.json says is packed")


def _check_shapes(model: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    for name, module in packed_layers(model).items():
        adapter = adapter_of(module)
        tensors = {key: getattr(module, key, None) for key in STATE}
        tensors |= {} if adapter is None else {f"weight_adapter.{key}": t for key, t in adapter.named_buffers()}
        for key, tensor in tensors.items():
            found = shapes.get(f"{name}.{key}")
            if found is None and key.startswith("weight_adapter") and f"{name}.weight_packed" in shapes:
                raise ValueError(
                    f"the checkpoint lacks {key} of layer {name!r}, which config.json says has an adapter"
                )
            if tensor is not None and found is not None and list(tensor.shape) != found:
                raise ValueError(
                    f"layer {name!r}: {key} has shape {found} in the checkpoint, and {list(tensor.shape)} is needed for "
                    f"a weight of shape {list(module.__dict__['weight_shape'])}: checkpoint and config do not belong together"
                )


def _restore_dtypes(model: nn.Module) -> None:
    """transformers 5.0 casts everything below a `_keep_in_fp32_modules` name to float32, codes too: cast back, exactly."""
    for module in packed_layers(model).values():
        for key in ("weight_packed", "weight_zero_point"):
            tensor = getattr(module, key, None)
            if tensor is not None and tensor.dtype != torch.uint8:
                tensor.data = tensor.data.to(torch.uint8)
        if (adapter := adapter_of(module)) is not None:
            adapter.restore_dtypes_()


def finish_packed_(model: nn.Module, config: R2QuantConfig) -> None:
    """Decodes the weights and gives a transformers model its quantizer and its safe `save_pretrained`, in place."""
    unpack_weights_(model)
    if isinstance(model, PreTrainedModel):
        quantizer = R2HfQuantizer(config, pre_quantized=True)
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        model.is_quantized, model.quantization_method = True, config.quant_method  # type: ignore[assignment]
        model.config.quantization_config = config
        model.config._is_quantized = True
        model.save_pretrained = types.MethodType(save_beside, model)  # type: ignore[method-assign]
    else:
        model.__dict__["r2_quant_config"] = config


if (
    "hf_r2" not in AUTO_QUANTIZER_MAPPING
):  # a second registration (a reload of this module) is an error in transformers
    register_quantization_config("hf_r2")(R2QuantConfig)
    register_quantizer("hf_r2")(R2HfQuantizer)
