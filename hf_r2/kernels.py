"""Linear layers of a packed model on torch's own integer and packed-weight kernels, where these are faster.

`torch._int_mm`, for layers whose inputs are rounded: codes times codes in int32, then one product of scales. A layer's output
differs from the float computation by float32 rounding, up to 1e-5 of the largest; in the next layers that may turn a code.
`torch._weight_int4pack_mm_for_cpu`, for float inputs and grids of 1 to 4 bits: 4 bits in memory, inputs, scales and outputs
rounded to bfloat16, up to 2e-2 of the largest output. Neither has a gradient for the input: where one is asked for, the weight
is decoded as ever.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.attach import refuse_prepared
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.encoders.base import Encoded
from hf_r2.packed_layers import KERNEL, adapter_of, encoded, packed_layers

GROUPS = (256, 128, 64, 32)  # weights that share a scale in the 4-bit kernel; ours share one for the whole row
WORTH = 0.95  # a kernel that takes a larger share of the float layer's time is not used
REPEATS = 7


class Kernel(nn.Module):
    """What computes a layer's output in the place of its decoded weight; buffers are no part of the state dict."""

    name: str

    def _hold(self, **tensors: Tensor) -> None:
        for key, value in tensors.items():
            self.register_buffer(key, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices; a cast of the model leaves scales as they are."""
        before = {key: value.dtype for key, value in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for key, dtype in before.items():
            setattr(self, key, getattr(self, key).to(dtype))
        return self


class Int8(Kernel):
    """y = (codes of x - zero_x) * scale_x times the weight's integers * scale_w, the sums in int32.

    `integers` [out, in], int8, are the weight's codes less their zero point, or less 128 where that does not fit: `lacking`
    [out] is what they lack. The zero points are put in afterwards, by the sums of rows.
    """

    name = "int8"
    quantizer: InputQuantizer

    def __init__(self, e: Encoded, quantizer: InputQuantizer):
        super().__init__()
        whole, scale = integers(e)
        lacking = torch.zeros_like(scale)
        if not -128 <= int(whole.min()) <= int(whole.max()) <= 127:
            whole, lacking = e.codes.int() - 128, (128 - _zero_point(e)).expand_as(scale)
        sums = whole.sum(1).float() + lacking * whole.shape[1]
        self._hold(integers=whole.to(torch.int8), scale=scale, lacking=lacking, sums=sums)
        self.lacks = bool(lacking.any())
        self.__dict__["quantizer"] = quantizer  # the layer has it registered already

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output in the dtype of `x` [.., in]."""
        codes, scale, zero_point = self.quantizer.codes(x)
        rows = (codes.reshape(-1, x.shape[-1]) ^ 128).view(torch.int8)  # less 128
        y = torch._int_mm(rows, self.integers.t()).float() + (128 - zero_point) * self.sums  # type: ignore[operator]
        if self.lacks:
            y += rows.sum(1, dtype=torch.int32)[:, None] * self.lacking  # type: ignore[operator]
        y = y.mul_(scale * self.scale).view(*x.shape[:-1], -1)  # type: ignore[operator]
        return (y if bias is None else y + bias).to(x.dtype)


class Int4(Kernel):
    """Weights of up to 4 bits, packed as torch's 4-bit kernel wants them: (code - 8) * scale + zero, in bfloat16."""

    name = "int4"

    def __init__(self, e: Encoded):
        super().__init__()
        whole, scale = integers(e)
        codes, zero = whole + 8, torch.zeros_like(scale)
        if not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
            codes, zero = e.codes.int(), (8 - _zero_point(e)) * scale
        count = codes.shape[1]
        self.group = next((g for g in GROUPS if count % g == 0), 0)
        if not self.group or codes.shape[0] % 16:
            raise ValueError(f"the 4-bit kernel takes multiples of 16 outputs and of {GROUPS[-1]} inputs")
        both = torch.stack([scale, zero], -1).to(torch.bfloat16).expand(count // self.group, -1, -1).contiguous()
        self._hold(packed=torch._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1), both=both)  # type: ignore

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output in the dtype of `x` [.., in]."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.both)  # type: ignore[arg-type]
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def integers(e: Encoded) -> tuple[Tensor, Tensor]:
    """The weight [out, in] as integers (int32), zero at 0, and their steps [out]."""
    assert e.scale is not None and e.zero_point is not None
    half = 2 if e.symmetric and e.bits == 1 else 1  # one bit: -1 and 1 in steps of half a scale
    whole = (half * (e.codes.float() - e.zero_point)).int()
    return whole, (e.scale / half).expand(whole.shape[0], 1).flatten().contiguous()


def _zero_point(e: Encoded) -> Tensor:
    assert e.zero_point is not None
    return e.zero_point.float().flatten()


@torch.no_grad()
def use_kernels_(model: nn.Module, rows: int = 128) -> None:
    """Puts the linear layers of a packed `model` on integer and 4-bit kernels where these are faster on its device, in place.

    `rows` is how many inputs (samples times tokens) a layer is timed with against its decoded weight, for which a layer of each
    shape is run. What a layer is on, and why not, `kernels_of` says. Weights on a kernel are not kept decoded.

    Call the model inside `torch.no_grad()`: kernels have no gradient, and where one may be wanted (grad mode on, and something
    trainable before the layer, as layer norms are) the weight is decoded in every call, which is slower than before. In eval
    mode the log warns of it once.

    Raises ValueError for a model that is prepared or not packed, and where no layer is faster: then nothing is changed.
    """
    refuse_prepared(model)
    layers = packed_layers(model)
    if not layers:
        raise ValueError("use_kernels_ needs a packed model: call quantize(model, config) first")
    found: dict[str, Kernel] = {}
    notes: dict[str, dict[str, Any]] = {}
    timed: dict[tuple[Any, ...], float] = {}
    for name, module in layers.items():
        kernel = _kernel(module)
        if isinstance(kernel, str):
            notes[name] = {"kernel": None, "why": kernel}
            continue
        key = (kernel.name, tuple(module.__dict__["weight_shape"]), module.__dict__["weight_dtype"])
        if key not in timed:
            timed[key] = _share(module, kernel, rows)
        notes[name] = {"kernel": kernel.name, "share": timed[key], "why": None}
        if timed[key] > WORTH:
            notes[name] |= {
                "kernel": None,
                "why": f"slower: {timed[key]:.2f} of the float layer's time at {rows} rows",
            }
        else:
            found[name] = kernel
    if not found:
        reasons = "; ".join(dict.fromkeys(note["why"] for note in notes.values()))
        raise ValueError(
            f"no layer would be faster on a kernel of this device ({reasons}): the decoded weights stay in use"
        )
    for name, module in layers.items():
        module.__dict__["weight_note"] = notes[name]
        if name in found:
            module.add_module(KERNEL, found[name])
            module._buffers["weight_decoded"] = None


def kernels_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{packed layer: {"kernel": "int8", "int4" or None, "share" of the float layer's time, "why"}} after `use_kernels_`."""
    return {
        name: dict(m.__dict__["weight_note"])
        for name, m in packed_layers(model).items()
        if "weight_note" in m.__dict__
    }


def _kernel(module: nn.Module) -> Kernel | str:
    """The kernel that fits a packed layer, or why there is none."""
    if type(module).__bases__[1] is not nn.Linear:  # behind the mixin of a dressed class
        return f"no kernel for {type(module).__bases__[1].__name__}"
    if adapter_of(module) is not None:
        return "it has a low-rank adapter"
    e, quantizer = encoded(module), module._modules.get("input_quantizer")
    if e.centroids is not None:
        return "a palette's levels are no integers"
    if e.codes.device.type != "cpu":
        return f"no kernel is tried on {e.codes.device.type}"
    if isinstance(quantizer, InputQuantizer):
        return Int8(e, quantizer) if quantizer.ready else "its inputs have no range yet"
    if e.bits > 4:
        return "float inputs, and more than 4 bits"
    try:
        return Int4(e)
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]


def _share(module: nn.Module, kernel: Kernel, rows: int) -> float:
    """Time of the kernel over that of the decoded weight, on random inputs; both as the layer does it, inputs rounded."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    quantizer = module._modules.get("input_quantizer")

    def plain() -> Tensor:
        return torch.nn.functional.linear(x if quantizer is None else quantizer(x), weight, bias)  # type: ignore[arg-type]

    times: list[list[float]] = [[], []]
    for _ in range(REPEATS + 1):
        for spent, run in zip(times, (lambda: kernel(x, bias), plain), strict=True):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])
