"""The module that holds the low-rank factors of a packed layer: frozen as stored, or trained in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import straight_through
from hf_r2.lowrank import FLOAT_BITS, LowRank, fold
from hf_r2.packing import pack_bits, packed_bytes, unpack_bits


class Adapter(nn.Module):
    """The factors of `LowRank`, `left` [m, r] and `right` [r, n], below a packed layer.

    16 bits: buffers `left` and `right`, float16. Fewer: both packed to bytes, with buffers `left_scale` and `right_scale`.
    While they are trained (`train_`) they are float32 parameters of the same names; the forward pass takes their float16
    values, with the identity's gradient, and these are what a checkpoint gets.
    """

    left: Tensor
    right: Tensor
    left_scale: Tensor | None
    right_scale: Tensor | None

    def __init__(self, rows: int, columns: int, rank: int, kernel: str, bits: int, device: Any = None):
        super().__init__()
        self.rows, self.columns, self.rank, self.kernel, self.bits = rows, columns, rank, kernel, bits
        self.trained = False
        for name, shape, scale in (("left", (rows, rank), (1, rank)), ("right", (rank, columns), (rank, 1))):
            if bits == FLOAT_BITS:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float16, device=device))
                self.register_buffer(f"{name}_scale", None)
            else:
                count = packed_bytes(shape[0] * shape[1], bits)
                self.register_buffer(name, torch.zeros(count, dtype=torch.uint8, device=device))
                self.register_buffer(f"{name}_scale", torch.zeros(scale, device=device))
        self._is_hf_initialized = True  # nothing for transformers' _init_weights to fill

    @classmethod
    def of(cls, stored: LowRank) -> Adapter:
        """Holds what is `stored`."""
        rows, columns = stored.left.shape[0], stored.right.shape[1]
        adapter = cls(rows, columns, stored.rank, stored.kernel, stored.bits, stored.left.device)
        packed = stored.bits < FLOAT_BITS
        adapter.left = pack_bits(stored.left, stored.bits) if packed else stored.left.clone()
        adapter.right = pack_bits(stored.right, stored.bits) if packed else stored.right.clone()
        adapter.left_scale, adapter.right_scale = stored.left_scale, stored.right_scale
        return adapter

    def stored(self) -> LowRank:
        """The factors as they are stored."""
        if self.bits == FLOAT_BITS:
            return LowRank(self.left.detach().half(), self.right.detach().half(), self.kernel)
        left = unpack_bits(self.left, self.bits, self.rows * self.rank).view(self.rows, self.rank)
        right = unpack_bits(self.right, self.bits, self.rank * self.columns).view(self.rank, self.columns)
        return LowRank(left, right, self.kernel, self.bits, self.left_scale, self.right_scale)

    def train_(self) -> None:
        """Makes the factors trainable, in place; from then on they are stored as float16."""
        if self.trained:
            return
        left, right = self.stored().factors()
        for name, factor in (("left", left), ("right", right)):
            del self._buffers[name], self._buffers[f"{name}_scale"]
            self.register_buffer(f"{name}_scale", None)
            self.register_parameter(name, nn.Parameter(factor.clone()))
        self.bits, self.trained = FLOAT_BITS, True

    def restore_dtypes_(self) -> None:
        """Casts the stored factors back, exactly, where a loader has given them the dtype of the model, in place."""
        dtype = torch.float16 if self.bits == FLOAT_BITS else torch.uint8
        self.left, self.right = self.left.to(dtype), self.right.to(dtype)

    def weight(self, shape: Sequence[int]) -> Tensor:
        """What is added to the layer's weight of this shape, float32; differentiable in the factors while they are trained."""
        if not self.trained:
            return self.stored().weight(shape)
        left, right = (straight_through(factor.float(), factor.half()) for factor in (self.left, self.right))
        return fold(left @ right, self.kernel, shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.trained:
            for name in ("left", "right"):
                destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].half()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Moves between devices as ever; a cast of the model leaves the stored factors as they are."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
