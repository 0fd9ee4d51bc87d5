"""What a layer reads, as second moments: the metric in which an error of its weight is an error of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_r2.layers import CONVOLUTIONS, WeightLayer
from hf_r2.ptq.layer_error import patches, unfolds

RIDGE = 0.01  # of the mean variance, added to every direction: few samples know nothing of the smallest ones


class InputMoments:
    """E[x x'] over the columns of a layer's weight matrix (`hf_r2.lowrank`), from at most about `rows` positions.

    With the kernel on the right the columns are the taps of a patch, with the kernel on the left the input channels. The
    groups of a convolution share their right factor, so their moments are averaged.
    """

    def __init__(self, layer: nn.Module, kernel: str, rows: int, centered: bool):
        self.layer, self.kernel, self.rows, self.centered = layer, kernel, rows, centered
        self.count, self.sum, self.square = 0, torch.zeros(()), torch.zeros(())

    @torch.no_grad()
    def add(self, x: Tensor, share: float) -> None:
        """Adds this share of `rows` from the first samples of a call."""
        wanted = max(1, int(self.rows * share))
        if isinstance(self.layer, CONVOLUTIONS):
            x = x[: -(-wanted // max(1, x[0, 0].numel()))]
        rows = self._rows(x)
        if len(rows) > 2 * wanted:
            rows = rows[:: len(rows) // wanted]
        rows = rows.transpose(0, 1).double()  # [G, rows, columns]
        self.count += rows.shape[1]
        self.sum, self.square = self.sum.to(rows) + rows.sum(1), self.square.to(rows) + rows.transpose(1, 2) @ rows

    def _rows(self, x: Tensor) -> Tensor:
        if self.kernel == "right" or not isinstance(self.layer, CONVOLUTIONS):
            return patches(self.layer, x)
        groups = self.layer.groups
        return x.float().flatten(2).transpose(1, 2).reshape(-1, groups, x.shape[1] // groups)

    def root(self) -> Tensor:
        """L, lower triangular [n, n] float64, with L L' = E[x x'], about the mean where the bias makes up for that."""
        square = self.square / self.count
        if self.centered:
            mean = self.sum / self.count
            square = square - mean[:, :, None] * mean[:, None, :]
        square = square.mean(0)
        level = float(square.diagonal().mean())
        if level <= 0:
            return torch.eye(len(square), dtype=torch.float64, device=square.device)
        square.diagonal().add_(RIDGE * level)
        return torch.linalg.cholesky(square)


@contextmanager
def input_moments(
    layers: Mapping[str, tuple[WeightLayer, str]], calls: int, rows: int = 8192, centered: bool = True
) -> Iterator[dict[str, InputMoments]]:
    """Inside, what the layers (with the side of their kernel) read in `calls` passes is added up.

    `centered`: about the mean, for layers with a bias that is to make up for the mean error. Layers that do not unfold
    (`unfolds`), and those whose inputs are along the first axis, are left out.
    """
    found = {
        name: InputMoments(layer.module, kernel, rows, centered and layer.module._parameters.get("bias") is not None)
        for name, (layer, kernel) in layers.items()
        if unfolds(layer.module) and layer.channel_axis == 0
    }
    handles = [layers[name][0].module.register_forward_pre_hook(_adder(m, 1 / calls)) for name, m in found.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _adder(moments: InputMoments, share: float) -> Callable[..., None]:
    return lambda _, arguments: moments.add(arguments[0].detach(), share)
