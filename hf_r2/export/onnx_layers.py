"""Packed layers as `torch.onnx` is to write them: packed bytes, what unpacks them, QuantizeLinear and DequantizeLinear.

The graph holds a layer's packed bytes as they are. Unpacking (shift, mask, cast) reads constants only, so onnxruntime does it
once, when it loads the file; what is left is DequantizeLinear on int8 codes, which its integer kernels take in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_r2.encoders.activations import InputQuantizer
from hf_r2.export.onnx_codes import Unpacking, op, unpacked
from hf_r2.grid import Grid
from hf_r2.lowrank import FLOAT_BITS, LowRank, fold
from hf_r2.packed_layers import Layout
from hf_r2.packing import pack_bits
from hf_r2.vectors import from_vectors


class OnnxInput(nn.Module):
    """A static `InputQuantizer` as QuantizeLinear and DequantizeLinear on uint8, codes below 8 bits clipped between them.

    A zero point that is no code (LSQ+ learns an offset) is added around them, in float.
    """

    scale: Tensor
    zero_point: Tensor
    ends: Tensor

    def __init__(self, quantizer: InputQuantizer):
        super().__init__()
        assert quantizer.scale is not None and quantizer.zero_point is not None
        scale, zero_point = quantizer.scale.detach().float(), quantizer.zero_point.detach().float()
        self.qmax = quantizer.grid.qmax
        # onnxruntime quantizes the float weight behind a DequantizeLinear by itself, one scale for the tensor: 3 points of
        # top-1 on a MobileNet. Layers that are to stay float get their inputs rounded by plain arithmetic.
        self.arithmetic = False
        self.on_grid = bool(zero_point == zero_point.round()) and 0 <= float(zero_point) <= self.qmax
        self.shift = 0.0 if self.on_grid else float(zero_point * scale)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", (zero_point if self.on_grid else torch.zeros_like(scale)).to(torch.uint8))
        self.register_buffer("lowest", torch.tensor(0, dtype=torch.uint8))
        self.register_buffer("highest", torch.tensor(self.qmax, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid; token ids pass."""
        if not x.is_floating_point():
            return x
        x = x if self.on_grid else x + self.shift
        if self.arithmetic:
            zero = self.zero_point.float()
            x = ((x / self.scale + zero).round().clamp(0, self.qmax) - zero) * self.scale
            return x if self.on_grid else x - self.shift
        codes = op("QuantizeLinear", [x, self.scale, self.zero_point], x.shape, torch.uint8)
        if self.qmax < 255:
            codes = op("Clip", [codes, self.lowest, self.highest], x.shape, torch.uint8)  # type: ignore[list-item]
        x = op("DequantizeLinear", [codes, self.scale, self.zero_point], x.shape, torch.float32)
        return x if self.on_grid else x - self.shift


class OnnxAdapter(nn.Module):
    """The two factors of a low-rank adapter, stored as in the checkpoint: two small operators beside a linear layer.

    Beside a weight that is decoded to float anyway they are added to it, once, at load.
    """

    def __init__(self, stored: LowRank):
        super().__init__()
        self.kernel, self.bits = stored.kernel, stored.bits
        self.shapes = {"left": tuple(stored.left.shape), "right": tuple(stored.right.shape)}
        for name, codes, scale in (
            ("left", stored.left, stored.left_scale),
            ("right", stored.right, stored.right_scale),
        ):
            self.register_buffer(name, codes if scale is None else pack_bits(codes, stored.bits))
            self.register_buffer(f"{name}_scale", scale)
        self.unpacking = None if stored.bits == FLOAT_BITS else Unpacking(stored.bits)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapter of a linear layer adds to its output: [.., in] to [.., out]."""
        return F.linear(F.linear(x, self._factor("right")), self._factor("left"))

    def weight(self, shape: Sequence[int]) -> Tensor:
        """What is added to a weight of this shape."""
        return fold(self._factor("left") @ self._factor("right"), self.kernel, shape)

    def _factor(self, name: str) -> Tensor:
        held: Tensor = getattr(self, name)
        if self.unpacking is None:
            return held.float()
        codes = unpacked(held, self.bits, self.shapes[name], self.unpacking)
        return (codes.float() - Grid(self.bits).symmetric_zero_point) * getattr(self, f"{name}_scale")


class OnnxWeight:
    """A layer of any class whose weight is decoded in the graph, and whose input goes through its `input_quantizer`."""

    layout: Layout
    mode: str

    @property
    def weight(self) -> Tensor:
        """The decoded weight with its adapter, float32, in its shape."""
        adapter = self.__dict__["_modules"].get("weight_adapter")
        decoded = self._decoded()
        return decoded if adapter is None else decoded + adapter.weight(self.weight_shape)  # type: ignore[attr-defined]

    def _decoded(self) -> Tensor:
        if self.layout.kind == "palette":
            return self._looked_up()
        if self.mode in ("integer", "dynamic"):
            return self._dequantized(self._signed(), self.layout.channel_axis)
        # Arithmetic on constants: onnxruntime would run a DequantizeLinear for every input anew.
        return (self._codes().float() - self.weight_zero_point) * self.weight_scale  # type: ignore[attr-defined]

    @property
    def bias(self) -> Tensor | None:
        """The bias; of an integer layer int32 codes in steps of input scale times weight scale, as its kernel adds it."""
        buffers, parameters = self.__dict__["_buffers"], self.__dict__["_parameters"]
        if "bias_codes" not in buffers:
            return parameters.get("bias")
        codes, scale, zero = (buffers[name] for name in ("bias_codes", "bias_step", "bias_zero"))
        return op(
            "DequantizeLinear",
            [codes, scale, zero],
            codes.shape,
            torch.float32,
            **({"axis": 0} if scale.dim() else {}),  # type: ignore[arg-type]
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the quantized input."""
        quantizer = self.__dict__["_modules"].get("input_quantizer")
        return super().forward(x if quantizer is None else quantizer(x), *args, **kwargs)  # type: ignore[misc]

    def _codes(self) -> Tensor:
        shape = self.code_shape  # type: ignore[attr-defined]
        return unpacked(self.weight_packed, self.layout.bits, shape, self.unpacking)  # type: ignore[attr-defined]

    def _signed(self) -> Tensor:
        """int8 codes, zero near the middle: integer kernels are fastest on these."""
        if "weight_codes" in self.__dict__["_buffers"]:
            return self.weight_codes  # type: ignore[attr-defined]
        codes = self._codes().to(torch.int8)
        return (
            codes * 2 - 1 if self.layout.bits == 1 and self.layout.symmetric else codes - 2 ** (self.layout.bits - 1)
        )

    def _dequantized(self, codes: Tensor, axis: int | None) -> Tensor:
        inputs = [codes, self.weight_step, self.weight_zero]  # type: ignore[attr-defined]
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        return op("DequantizeLinear", inputs, codes.shape, torch.float32, **options)

    def _looked_up(self) -> Tensor:
        rows = F.embedding(self._codes().flatten().int(), self.weight_centroids)  # type: ignore[attr-defined]
        if self.layout.dim > 1:
            return from_vectors(rows, self.__dict__["_buffers"].get("weight_rest"), self.weight_shape)  # type: ignore[attr-defined]
        value = rows.view(self.weight_shape)  # type: ignore[attr-defined]
        return value * self.weight_scale if self.layout.scaled else value  # type: ignore[attr-defined]


class OnnxLinear(OnnxWeight):
    """Linear layers: codes transposed for integer kernels (which pack [in, out] at load), blocks of codes for MatMulNBits."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        quantizer = self.__dict__["_modules"].get("input_quantizer")
        x = x if quantizer is None or self.mode == "dynamic" else quantizer(x)
        if self.mode == "float":
            return F.linear(x, self.weight, self.bias)
        if self.mode == "dynamic":
            x, y = self._dynamic(x)
        else:
            y = self._blocks(x) if self.mode == "blocks" else torch.matmul(x, self._input_major())
        adapter = self.__dict__["_modules"].get("weight_adapter")
        y = y if self.bias is None else y + self.bias
        return y if adapter is None else y + adapter(x)

    def _decoded(self) -> Tensor:
        """[out, in]: for code that reads the weight elsewhere than in `forward`."""
        return super()._decoded() if self.mode not in ("integer", "dynamic") else self._input_major().t()

    def _input_major(self) -> Tensor:
        return self._dequantized(self._transposed(), None if self.layout.channel_axis is None else 1)

    def _transposed(self) -> Tensor:
        return self._signed() if "weight_codes" in self.__dict__["_buffers"] else self._signed().t()

    def _dynamic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs on the grid of their own range: DynamicQuantizeLinear, MatMulInteger, then one product of scales.

        Returns the inputs on their grid, and the products.
        """
        codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            [x],
            {},
            dtypes=[torch.uint8, torch.float32, torch.uint8],
            shapes=[x.shape, [], []],
        )
        shape = [*x.shape[:-1], self.weight_shape[0]]  # type: ignore[attr-defined]
        sums = op("MatMulInteger", [codes, self._transposed(), zero, self.weight_zero], shape, torch.int32)  # type: ignore[attr-defined]
        y = sums.float() * (scale * self.weight_step)  # type: ignore[attr-defined]
        return op("DequantizeLinear", [codes, scale, zero], x.shape, torch.float32), y

    def _blocks(self, x: Tensor) -> Tensor:
        out, features = self.weight_shape  # type: ignore[attr-defined]
        count = features // self.block  # type: ignore[attr-defined]
        codes = self.weight_packed.view(out, count, -1)  # type: ignore[attr-defined]
        scale = self.weight_scale.view(-1, 1).expand(out, count)  # type: ignore[attr-defined]
        zero = self.__dict__["_buffers"].get("block_zero")
        return op(
            "MatMulNBits", [x, codes, scale, *([] if zero is None else [zero])], [*x.shape[:-1], out], torch.float32,
            "com.microsoft", K=features, N=out, bits=self.layout.bits, block_size=self.block, accuracy_level=1,  # type: ignore[attr-defined]
        )  # fmt: skip


class OnnxTable(OnnxWeight):
    """Embeddings: the rows that are looked up are decoded, the table stays packed where its rows end on bytes."""

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of these ids."""
        rows, width = self.weight_shape  # type: ignore[attr-defined]
        if self.layout.dim > 1 or width * self.layout.bits % 8 or 8 % self.layout.bits:
            return self._scaled(F.embedding(ids, self.weight))
        packed = F.embedding(ids, self.weight_packed.view(rows, -1))  # type: ignore[attr-defined]
        codes = unpacked(packed, self.layout.bits, [*ids.shape, width], self.unpacking)  # type: ignore[attr-defined]
        if self.layout.kind == "palette":
            value = F.embedding(codes.int(), self.weight_centroids)[..., 0]  # type: ignore[attr-defined]
            return self._scaled(value * self._rows(self.weight_scale, ids) if self.layout.scaled else value)  # type: ignore[attr-defined]
        zero = self._rows(self.weight_zero_point, ids)  # type: ignore[attr-defined]
        return self._scaled((codes.float() - zero) * self._rows(self.weight_scale, ids))  # type: ignore[attr-defined]

    def _rows(self, values: Tensor, ids: Tensor) -> Tensor:
        return values if values.numel() == 1 else F.embedding(ids, values)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows * getattr(self, "embed_scale", 1.0)  # the BART family scales inside of the layer
