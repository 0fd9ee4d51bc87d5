"""Layers whose weight is stored packed: the state dict holds codes and what decodes them instead of `weight`.

Keys: `weight_packed` (uint8 bytes, a frozen parameter, so that transformers can tie it), `weight_scale`,
`weight_zero_point` (uint8) or `weight_centroids`, and `weight_rest`, what fills no vector of a palette of vectors (buffers: a
float *parameter* would come back trainable from `from_pretrained`). Below `weight_adapter`: the factors of a low-rank adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.adapter import Adapter
from hf_r2.dressed import QuantizedInput, dress, undress
from hf_r2.encoders.base import Encoded
from hf_r2.grid import Grid
from hf_r2.lowrank import FLOAT_BITS, SIDES, check_adapter_bits, sides
from hf_r2.packing import pack_bits, packed_bytes, unpack_bits
from hf_r2.vectors import CONVENTION

logger = logging.getLogger(__name__)
STATE = ("weight_packed", "weight_scale", "weight_zero_point", "weight_centroids", "weight_rest")
KERNEL = "weight_kernel"  # the child that computes a layer's output from its codes, see `hf_r2.kernels`
_unpack_at_load: ContextVar[bool] = ContextVar("unpack_at_load", default=True)


@contextmanager
def packed_in_memory() -> Iterator[None]:
    """Models that are converted or loaded inside keep their weights packed, and unpack them in every forward pass.

    Saves memory, costs time: by default a packed model unpacks once, when it is loaded.
    """
    token = _unpack_at_load.set(False)
    try:
        yield
    finally:
        _unpack_at_load.reset(token)


@dataclass(frozen=True)
class Layout:
    """What is needed to build a packed layer before its tensors are there; goes into config.json for each layer."""

    bits: int
    kind: str  # "affine" or "palette"
    channel_axis: int | None = None
    symmetric: bool = True
    scaled: bool = False  # a palette with a scale beside it; affine layers always have one
    dim: int = 1  # weights that a code of a palette stands for
    vectors: str | None = None  # how these are taken from the weight, see `hf_r2.vectors`
    act_bits: int | None = None
    act_range: str = "static"
    adapter_rank: int = 0  # of the low-rank adapter beside the codes, 0 for none
    adapter_kernel: str = "right"  # the side of its factors that the weight's kernel is on, see `hf_r2.lowrank`
    adapter_bits: int = FLOAT_BITS
    streams: dict[str, int] | None = (
        None  # bytes of the tensors that the checkpoint holds entropy-coded, see `hf_r2.coded`
    )

    def __post_init__(self) -> None:
        Grid(self.bits)
        if self.kind not in ("affine", "palette"):
            raise ValueError(f"kind must be 'affine' or 'palette', got {self.kind!r}")
        if self.dim > 1 and self.vectors != CONVENTION:
            raise ValueError(f"vectors of weights are taken {CONVENTION!r} here, got {self.vectors!r}")
        if self.adapter_kernel not in SIDES or not isinstance(self.adapter_rank, int) or self.adapter_rank < 0:
            raise ValueError(
                f"adapter_kernel must be one of {', '.join(SIDES)} and adapter_rank an integer from 0 on, got "
                f"{self.adapter_kernel!r} and {self.adapter_rank!r}"
            )
        check_adapter_bits(self.adapter_bits)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and `bits` and `kind`."""
        defaults = asdict(Layout(self.bits, self.kind))
        return {k: v for k, v in asdict(self).items() if v != defaults[k] or k in ("bits", "kind")}

    def scale_shape(self, shape: torch.Size) -> list[int]:
        """Shape of the scale of a weight of this shape: broadcastable to it."""
        return [n if d == self.channel_axis else 1 for d, n in enumerate(shape)]


class PackedWeight(QuantizedInput):
    """A packed layer: `weight` is decoded from the codes, once at load or in every forward pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the quantized input, or that of its kernel where no gradient of the input is wanted."""
        kernel = self.__dict__["_modules"].get(KERNEL)
        if kernel is None or x.numel() == 0:
            return super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad:
            if not self.training and not torch.compiler.is_compiling():  # type: ignore[attr-defined]
                _warn_of_gradients()
            return super().forward(x, *args, **kwargs)
        return kernel(x, self.bias)  # type: ignore[attr-defined]

    @property
    def weight(self) -> Tensor:
        """The decoded weight with its adapter, in the dtype of the model."""
        decoded: Tensor | None = self.__dict__["_buffers"].get("weight_decoded")
        adapter, dtype = adapter_of(self), self.__dict__["weight_dtype"]  # type: ignore[arg-type]
        if adapter is None or not adapter.trained:
            return decoded if decoded is not None else encoded(self).decode().to(dtype)  # type: ignore[arg-type]
        decoded = encoded(self).decode_codes() if decoded is None else decoded  # type: ignore[arg-type]
        return (decoded + adapter.weight(decoded.shape)).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices as ever; a cast changes the dtype computed with, never the stored scales."""
        exact = {k: v for k, v in self.__dict__["_buffers"].items() if k in STATE and v is not None}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for key, before in exact.items():
            after = self.__dict__["_buffers"][key]
            if after.dtype != before.dtype:
                self.__dict__["_buffers"][key] = before.to(after.device)
        probe = torch.empty(0, dtype=self.__dict__["weight_dtype"], device=self.weight_packed.device)  # type: ignore[attr-defined]
        self.__dict__["weight_dtype"] = fn(probe).dtype
        return self


@cache
def _warn_of_gradients() -> None:
    logger.warning(
        "layers on a kernel decode their weight in every call while gradients are on: call the model inside torch.no_grad()"
    )


def is_packed(module: nn.Module) -> bool:
    """True for a packed layer."""
    return isinstance(module, PackedWeight)


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The packed layers of `model` by name, tied ones included."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def layout_of(encoded: Encoded, channel_axis: int, module: nn.Module) -> Layout:
    """The layout of a layer with this encoded weight."""
    quantizer = module._modules.get("input_quantizer")
    act_bits = quantizer.grid.bits if quantizer is not None else None  # type: ignore[union-attr]
    act_range = "dynamic" if quantizer is not None and quantizer.dynamic else "static"
    axis = channel_axis if encoded.scale is not None and encoded.scale.numel() > 1 else None
    beside: dict[str, Any] = {"act_bits": act_bits, "act_range": act_range}
    if encoded.adapter is not None:
        low = encoded.adapter
        beside |= {"adapter_rank": low.rank, "adapter_kernel": low.kernel, "adapter_bits": low.bits}
    if encoded.centroids is not None:
        scaled, dim = encoded.scale is not None, encoded.dim
        vectors = CONVENTION if dim > 1 else None
        return Layout(encoded.bits, "palette", axis, True, scaled, dim, vectors, **beside)
    return Layout(encoded.bits, "affine", axis, encoded.symmetric, **beside)


def pack_layer_(module: nn.Module, encoded: Encoded, layout: Layout, packed: nn.Parameter | None = None) -> None:
    """Replaces the float weight of a layer by its packed form, in place; tied layers pass the `packed` they share."""
    dtype = module._parameters["weight"].dtype  # type: ignore[union-attr]
    if encoded.adapter is not None:
        module.add_module("weight_adapter", Adapter.of(encoded.adapter))
    if packed is None:
        packed = nn.Parameter(pack_bits(encoded.codes, encoded.bits), requires_grad=False)
    zero_point = None if encoded.symmetric or encoded.zero_point is None else encoded.zero_point.to(torch.uint8)
    rest = encoded.rest if encoded.rest is not None and encoded.rest.numel() else None
    tensors = (packed, encoded.scale, zero_point, encoded.centroids, rest)
    _install(module, layout, torch.Size(encoded.weight_shape), dtype, tensors)


def build_packed_(module: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
    """Turns a float skeleton layer into an empty packed one, in place, so that a checkpoint's tensors have a place to go."""
    weight = module._parameters["weight"]
    assert weight is not None
    shape, device = weight.shape, weight.device
    count = packed_bytes(weight.numel() // layout.dim, layout.bits)
    packed = nn.Parameter(torch.empty(count, dtype=torch.uint8, device=device), requires_grad=False)
    scale = zero_point = centroids = rest = None
    if layout.kind == "affine" or layout.scaled:
        scale = torch.empty(layout.scale_shape(shape), dtype=torch.float32, device=device)
    if layout.kind == "palette":
        centroids = torch.empty(2**layout.bits, layout.dim, device=device)
        if weight.numel() % layout.dim:
            rest = torch.empty(weight.numel() % layout.dim, device=device)
    elif not layout.symmetric:
        zero_point = torch.empty_like(scale, dtype=torch.uint8)  # type: ignore[arg-type]
    if layout.adapter_rank:
        form = (layout.adapter_rank, layout.adapter_kernel, layout.adapter_bits)
        module.add_module("weight_adapter", Adapter(*sides(shape, layout.adapter_kernel), *form, device))
    _install(module, layout, shape, dtype, (packed, scale, zero_point, centroids, rest))


def _install(
    module: nn.Module,
    layout: Layout,
    shape: torch.Size,
    dtype: torch.dtype,
    tensors: tuple[nn.Parameter, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    del module._parameters["weight"]
    packed, *buffers = tensors
    module.register_parameter("weight_packed", packed)
    for name, tensor in zip(STATE[1:], buffers, strict=True):
        if tensor is not None:
            module.register_buffer(name, tensor.detach().clone() if not tensor.is_meta else tensor)
    module.register_buffer("weight_decoded", None, persistent=False)
    module.__dict__.update(weight_layout=layout, weight_shape=torch.Size(shape), weight_dtype=dtype)
    module._is_hf_initialized = True  # type: ignore[assignment]  # else transformers' _init_weights would fill `weight`
    dress(module, PackedWeight)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The low-rank adapter of a packed layer, None without one."""
    found = module.__dict__["_modules"].get("weight_adapter")
    return found if isinstance(found, Adapter) else None


def encoded(module: nn.Module) -> Encoded:
    """The `Encoded` of a packed layer, unpacked."""
    adapter, codes = adapter_of(module), _encoded_codes(module)
    return codes if adapter is None else replace(codes, adapter=adapter.stored())


def _encoded_codes(module: nn.Module) -> Encoded:
    layout: Layout = module.__dict__["weight_layout"]
    shape: torch.Size = module.__dict__["weight_shape"]
    packed: Tensor = module.weight_packed  # type: ignore[assignment]
    codes = unpack_bits(packed.data, layout.bits, shape.numel() // layout.dim)
    if layout.dim > 1:
        rest, centroids = getattr(module, "weight_rest", None), module.weight_centroids
        return Encoded(codes, layout.bits, centroids=centroids, rest=rest, shape=tuple(shape))  # type: ignore[arg-type]
    codes = codes.view(shape)
    if layout.kind == "palette":
        factor: Tensor | None = module.weight_scale if layout.scaled else None  # type: ignore[assignment]
        return Encoded(codes, layout.bits, factor, centroids=module.weight_centroids)  # type: ignore[arg-type]
    scale: Tensor = module.weight_scale  # type: ignore[assignment]
    grid = Grid(layout.bits, layout.symmetric)
    zero_point = torch.full_like(scale, grid.symmetric_zero_point) if layout.symmetric else module.weight_zero_point
    return Encoded(codes, layout.bits, scale, zero_point, layout.symmetric)  # type: ignore[arg-type]


@torch.no_grad()
def unpack_weights_(model: nn.Module, unpack: bool | None = None) -> None:
    """Decodes every packed weight into memory (`unpack`, the default outside `packed_in_memory`), or drops those copies.

    Tied layers share the decoded tensor, as they share the packed one. Adapters are decoded with the weights, but for those
    that are trained: they are added, in float32, in every forward pass.
    """
    unpack = _unpack_at_load.get() if unpack is None else unpack
    shared: dict[tuple[int, torch.dtype], Tensor] = {}
    for module in packed_layers(model).values():
        module._buffers["weight_decoded"] = None
        if unpack:
            adapter = adapter_of(module)
            trained = adapter is not None and adapter.trained
            dtype = torch.float32 if trained else module.__dict__["weight_dtype"]
            key = (id(module.weight_packed), dtype)
            if key not in shared:
                value = encoded(module).decode_codes() if trained else encoded(module).decode()
                shared[key] = value.to(dtype)
            module._buffers["weight_decoded"] = shared[key]


@torch.no_grad()
def dequantize_layer_(module: nn.Module, weight: nn.Parameter) -> None:
    """Gives a packed layer a float parameter instead of its packed form, in place."""
    undress(module)
    module._modules.pop("input_quantizer", None)
    module._modules.pop("weight_adapter", None)
    module._modules.pop(KERNEL, None)
    for name in (*STATE, "weight_decoded"):
        module._buffers.pop(name, None)
        module._parameters.pop(name, None)
    for name in ("weight_layout", "weight_shape", "weight_dtype"):
        module.__dict__.pop(name, None)
    module.register_parameter("weight", weight)
