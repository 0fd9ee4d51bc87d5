"""Which form each packed layer takes in an ONNX graph, and a copy of the model with its layers in that form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_r2.dressed import dress, undress
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.encoders.base import Encoded
from hf_r2.export.onnx_codes import Unpacking
from hf_r2.export.onnx_layers import OnnxAdapter, OnnxInput, OnnxLinear, OnnxTable, OnnxWeight
from hf_r2.layers import TRANSPOSED, is_table
from hf_r2.packed_layers import Layout, encoded, packed_layers
from hf_r2.packing import pack_bits

BLOCKS = (256, 128, 64, 32, 16)  # weights that share a scale in MatMulNBits: it allows these
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """How a layer is written: `mode` "integer", "dynamic", "blocks", "table" or "float"; for "float" also `why`.

    For the first two also the `digest` of the int8 codes that the kernel reads: what it is known by in other graphs.
    """

    mode: str
    why: str = ""
    digest: str = ""


def dress_(model: nn.Module, blocks: tuple[int, ...]) -> dict[str, Form]:
    """Gives every packed layer its ONNX form, in place; `blocks`: widths of linear layers that go to MatMulNBits.

    Returns {layer: form}.
    """
    layers = packed_layers(model)
    owners: dict[int, int] = {}
    for module in layers.values():
        owners[id(module.weight_packed)] = owners.get(id(module.weight_packed), 0) + 1
    forms = {}
    for name, module in layers.items():
        tied = owners[id(module.weight_packed)] > 1
        forms[name] = _dress_layer_(module, blocks, tied)
    return forms


def _dress_layer_(module: nn.Module, blocks: tuple[int, ...], tied: bool) -> Form:
    what, layout = encoded(module), module.__dict__["weight_layout"]
    quantizer = module._modules.get("input_quantizer")
    inputs = OnnxInput(quantizer) if isinstance(quantizer, InputQuantizer) and not quantizer.dynamic else None
    undress(module)
    mixin = _mixin(module)
    form = _form(module, mixin, layout, what, quantizer, inputs, blocks)
    if form.mode == "integer" and module.bias is not None and inputs is not None and not tied:
        what = room_for_bias(what, layout.channel_axis, module.bias.detach().float() / inputs.scale)  # type: ignore[operator]
        module.register_parameter("weight_packed", nn.Parameter(pack_bits(what.codes, what.bits), requires_grad=False))
    if inputs is not None:
        inputs.arithmetic = form.mode == "float"
        module.add_module("input_quantizer", inputs)
    shape, step = tuple(what.weight_shape), inputs.scale if inputs is not None else None
    if what.adapter is not None:
        module.add_module("weight_adapter", OnnxAdapter(what.adapter))
    for name in ("weight_decoded", "weight_scale", "weight_zero_point"):
        module._buffers.pop(name, None)
    dress(module, mixin)
    module.__dict__.update(layout=layout, mode=form.mode, weight_shape=shape, code_shape=tuple(what.codes.shape))
    module.add_module("unpacking", Unpacking(layout.bits))
    _add_decoding_(module, what, tied)
    if form.mode == "integer" and module.bias is not None:
        _add_bias_(module, step * module.weight_step)  # type: ignore[operator]
    if form.mode in ("integer", "dynamic"):
        codes = _signed_codes(what)
        form = replace(form, digest=digest(codes.t() if isinstance(module, OnnxLinear) else codes))
    return form


def _mixin(module: nn.Module) -> type:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return OnnxLinear
    known = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return OnnxTable if is_table(module) and known else OnnxWeight


def _form(
    module: nn.Module,
    mixin: type,
    layout: Layout,
    what: Encoded,
    quantizer: nn.Module | None,
    inputs: OnnxInput | None,
    blocks: tuple[int, ...],
) -> Form:
    if is_table(module):
        return Form("table")
    linear = mixin is OnnxLinear
    if layout.kind == "palette":
        return Form("float", "a palette's levels are no integers")
    if quantizer is None:
        if linear and layout.bits in blocks and _block(what) is not None:
            return Form("blocks")
        return Form("float", "its inputs are float (no act_bits)")
    if what.adapter is not None and not linear:
        return Form("float", "its low-rank adapter is added to the weight at load")
    if isinstance(module, TRANSPOSED):
        return Form("float", "onnxruntime has no integer kernel for transposed convolutions")
    if inputs is None:
        if linear and quantizer.grid.bits == 8:  # type: ignore[union-attr]
            return Form("dynamic")
        return Form("float", "the range of its inputs is dynamic; integer kernels for that: linear layers at 8 bits")
    if not inputs.on_grid:
        return Form("float", "the zero point of its inputs is no integer (a learned offset)")
    zero = what.zero_point
    if not what.symmetric and zero is not None and bool((zero != zero.flatten()[0]).any()):
        return Form("float", "the zero points of its channels differ (symmetric=True gives them one)")
    return Form("integer")


def room_for_bias(what: Encoded, axis: int | None, bias: Tensor) -> Encoded:
    """The weight on wider steps in channels where the bias, counted in steps, would not fit in int32; the rest untouched.

    `bias` [out] is in units of the input's step. Such channels are nearly dead: their weights are tiny beside the bias, and
    what the coarser codes change is below 1e-7 of it for each weight.
    """
    assert what.scale is not None and what.zero_point is not None
    least = (
        bias.abs().view([-1 if d == axis else 1 for d in range(what.scale.dim())])
        if axis is not None
        else bias.abs().max()
    )
    wider = torch.maximum(what.scale, 2 * least / INT32_MAX)
    if bool((wider == what.scale).all()):
        return what
    codes = ((what.codes.float() - what.zero_point) * (what.scale / wider) + what.zero_point).round()
    return replace(what, codes=codes.clamp(0, 2**what.bits - 1).to(torch.uint8), scale=wider)


def _block(what: Encoded) -> int | None:
    """The largest block that divides the input features; None where there is none."""
    features = what.weight_shape[-1]
    return next((size for size in BLOCKS if features % size == 0), None)


def _add_decoding_(module: nn.Module, what: Encoded, tied: bool) -> None:
    """The buffers that the form reads."""
    mode, layout = module.__dict__["mode"], module.__dict__["layout"]
    if what.scale is not None:
        shape = [-1] if what.scale.numel() > 1 else []
        if mode in ("integer", "dynamic"):
            step, zero = _signed_grid(what)
            module.register_buffer("weight_step", step.reshape(shape))
            module.register_buffer("weight_zero", zero.reshape(shape))
        else:
            module.register_buffer("weight_scale", what.scale)
            if what.zero_point is not None:
                zero = what.zero_point.float()
                module.register_buffer("weight_zero_point", zero.flatten()[0] if what.symmetric else zero)
    if mode == "blocks":
        module.__dict__["block"] = size = _block(what)
        if not what.symmetric:
            module.register_buffer("block_zero", _block_zero(what, what.weight_shape[-1] // size))  # type: ignore[operator]
    if mode in ("integer", "dynamic") and layout.bits == 8 and not tied:
        codes = _signed_codes(what)
        linear = isinstance(module, OnnxLinear)
        module.register_buffer("weight_codes", codes.t().contiguous() if linear else codes)
        del module._parameters["weight_packed"]


def digest(codes: Tensor) -> str:
    """A name for codes, int8, by their shape and content."""
    array = codes.contiguous().cpu().numpy()
    return f"{tuple(array.shape)}:{hashlib.sha1(array.tobytes(), usedforsecurity=False).hexdigest()}"


def _signed_codes(what: Encoded) -> Tensor:
    """The int8 codes of `_signed_grid`, in the shape of the weight."""
    codes = what.codes.int()
    codes = 2 * codes - 1 if what.bits == 1 and what.symmetric else codes - 2 ** (what.bits - 1)
    return codes.to(torch.int8)


def _signed_grid(what: Encoded) -> tuple[Tensor, Tensor]:
    """Scale and int8 zero point of the signed codes: c - 2**(bits - 1), or at 1 bit symmetric 2 c - 1 in half steps."""
    assert what.scale is not None and what.zero_point is not None
    if what.bits == 1 and what.symmetric:
        return what.scale / 2, torch.zeros_like(what.scale, dtype=torch.int8)
    return what.scale, (what.zero_point.float() - 2 ** (what.bits - 1)).to(torch.int8)


def _block_zero(what: Encoded, count: int) -> Tensor:
    """Zero points as MatMulNBits reads them: [out, ceil(count x bits / 8)] uint8, each repeated for all blocks of its row."""
    assert what.zero_point is not None
    per_byte = 8 // what.bits
    zero = what.zero_point.flatten().int()
    byte = sum(zero << (i * what.bits) for i in range(per_byte))
    byte = torch.as_tensor(byte).expand(what.weight_shape[0]) if zero.numel() == 1 else byte
    return byte.view(-1, 1).expand(-1, -(-count // per_byte)).to(torch.uint8).contiguous()  # type: ignore[union-attr]


def _add_bias_(module: nn.Module, step: Tensor) -> None:
    bias = module._parameters["bias"].detach().float()  # type: ignore[union-attr]
    module.register_buffer("bias_codes", (bias.double() / step).round().to(torch.int32))
    module.register_buffer("bias_step", step.clone())
    module.register_buffer("bias_zero", torch.zeros_like(step, dtype=torch.int32))
