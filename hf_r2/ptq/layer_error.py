"""The output error of one layer as a function of its weight: what AdaRound minimizes.

Three forms of E |f(W x + b) - f(W~ x^ + b)|^2 (sum over channels, mean over positions), x the input in the float model, x^
in the part that is quantized already: `Gram` (no activation f: a quadratic form, no forward pass), `Rows` (positions drawn
at random, with f), `Calls` (the layer itself, for those that do not unfold). With `correct_bias` the first two take the error
that is left when the bias makes up for the mean: W~ (x^ - E x^) + E[W x + b] in place of W~ x^ + b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_r2.layers import is_transformers_conv1d

ROWS = 1 << 16  # positions kept of a layer, over all batches
BYTES = 1 << 29  # bound on what `Rows` keeps of a layer
AT_ONCE = 1 << 26  # bytes that are unfolded at once
Activation = Callable[[Tensor], Tensor]


def unfolds(layer: nn.Module) -> bool:
    """Whether the layer is a matrix product over patches of its input: linear layers, 1-d and 2-d convolutions."""
    plain = isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.padding_mode == "zeros" and layer.padding != "same"
    return plain or isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as [groups, out / groups, in], differentiable."""
    if is_transformers_conv1d(layer):
        return weight.t()[None]
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def patches(layer: nn.Module, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """What the layer multiplies with its weight: [rows, groups, in]; `positions` picks rows of the result."""
    x = x.detach().float()
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        rows = x.reshape(-1, 1, x.shape[-1])
        return rows if positions is None else rows[positions]
    size, stride = _two(layer.kernel_size), _two(layer.stride)
    padding, dilation = _two(0 if layer.padding == "valid" else layer.padding, 0), _two(layer.dilation)
    x = x.unsqueeze(-2) if isinstance(layer, nn.Conv1d) else x
    unfolded = F.unfold(x, size, dilation, padding, stride)  # [N, C k, L]
    rows = unfolded.transpose(1, 2).reshape(-1, layer.groups, unfolded.shape[1] // layer.groups)
    return rows if positions is None else rows[positions]


def _two(value: object, neutral: int = 1) -> tuple[int, int]:
    """A convolution's setting for two axes; a 1-d one has `neutral` on the first."""
    values = (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    return values if len(values) == 2 else (neutral, values[0])  # type: ignore[return-value]


class Rows:
    """Positions drawn at random, the same in both models: inputs x^ [n, G, d] and targets W x + b [n, O]."""

    def __init__(
        self,
        layer: nn.Module,
        activation: Activation | None,
        correct_bias: bool = False,
        rows: int = ROWS,
        seed: int = 0,
    ):
        self.layer, self.f, self.correct_bias = layer, activation or (lambda y: y), correct_bias
        self.bias = None if layer.bias is None else layer.bias.detach().float()  # type: ignore[union-attr,operator]
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []

    def add(self, x: Tensor, quantized: Tensor, weight: Tensor, calls: int) -> None:
        """Draws positions of one call of the layer, of `calls` in all; `weight` is the float one."""
        with torch.no_grad():
            w = matrix(self.layer, weight.float())
            share = max(1, min(self.rows, BYTES // (8 * w.shape[0] * w.shape[2])) // calls)
            parts = _parts(self.layer, x)
            for one, other in zip(x.split(parts), quantized.split(parts), strict=True):
                count = max(1, share * len(one) // len(x))
                a = patches(self.layer, one)
                chosen = torch.randperm(len(a), generator=self.generator)[:count].to(a.device)
                b = patches(self.layer, other, chosen)
                self._x.append(b)
                self._y.append(self._apply(a[chosen], w))

    def close(self) -> None:
        """After the last call: everything in one piece."""
        self.x, y = torch.cat(self._x), torch.cat(self._y)
        self._x, self._y = [], []
        if self.correct_bias:
            self.center, self.bias = self.x.mean(0), y.mean(0)
            self.x -= self.center
        self.y = self.f(y)

    def corrected_bias(self, weight: Tensor) -> Tensor:
        """The bias that makes up for the mean error of this weight: E[W x + b] - W~ E[x^]."""
        assert self.correct_bias and self.bias is not None
        w = matrix(self.layer, weight.float())
        return self.bias - torch.einsum("gd,god->go", self.center, w).flatten()

    def _apply(self, x: Tensor, w: Tensor) -> Tensor:
        out = torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1).reshape(len(x), -1)
        return out if self.bias is None else out + self.bias

    def loss(self, weight: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """The error on `batch` positions."""
        chosen = torch.randint(len(self.x), (min(batch, len(self.x)),), generator=generator).to(self.x.device)
        out = self.f(self._apply(self.x[chosen], matrix(self.layer, weight)))
        return (out - self.y[chosen]).square().sum(1).mean()

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """The error over all positions."""
        w = matrix(self.layer, weight.float())
        parts = zip(self.x.split(8192), self.y.split(8192), strict=True)
        total = sum(float((self.f(self._apply(x, w)) - y).square().sum()) for x, y in parts)
        return total / max(1, len(self.x))


class Gram:
    """Without an activation: tr(W~ H W~') - 2 tr(P W~') + E |y|^2 with H = E[x^ x^'], P = E[y x^'], y = W x."""

    def __init__(self, layer: nn.Module, correct_bias: bool = False, rows: int = 4 * ROWS, seed: int = 0):
        self.layer, self.rows, self.generator = layer, rows, torch.Generator().manual_seed(seed)
        self.correct_bias = correct_bias
        self.count = 0

    def add(self, x: Tensor, quantized: Tensor, weight: Tensor, calls: int) -> None:
        """Adds one call of the layer, at most `rows / calls` positions of it drawn at random."""
        with torch.no_grad():
            w = matrix(self.layer, weight.float())
            if self.count == 0:
                groups, out, d = w.shape
                self.h, self.p, self.yy = w.new_zeros(groups, d, d), w.new_zeros(groups, out, d), 0.0
                self.mean_x, self.mean_y = w.new_zeros(groups, d), w.new_zeros(groups, out)
            parts = _parts(self.layer, x)
            for one, other in zip(x.split(parts), quantized.split(parts), strict=True):
                a = patches(self.layer, one)
                count = max(1, self.rows // calls * len(one) // len(x))
                chosen = None
                if count < len(a):
                    chosen = torch.randint(len(a), (count,), generator=self.generator).to(a.device)
                    a = a[chosen]
                b = patches(self.layer, other, chosen).transpose(0, 1)
                y = torch.bmm(a.transpose(0, 1), w.transpose(1, 2))
                self.h += torch.bmm(b.transpose(1, 2), b)
                self.p += torch.bmm(y.transpose(1, 2), b)
                self.yy += float(y.square().sum())
                self.mean_x, self.mean_y = self.mean_x + b.sum(1), self.mean_y + y.sum(1)
                self.count += len(a)

    def close(self) -> None:
        """After the last call: sums become means."""
        self.h, self.p, self.yy = self.h / self.count, self.p / self.count, self.yy / self.count
        self.mean_x, self.mean_y = self.mean_x / self.count, self.mean_y / self.count
        if self.correct_bias:
            self.h -= self.mean_x[:, :, None] * self.mean_x[:, None, :]
            self.p -= self.mean_y[:, :, None] * self.mean_x[:, None, :]
            self.yy -= float(self.mean_y.square().sum())

    def corrected_bias(self, weight: Tensor) -> Tensor:
        """The bias that makes up for the mean error of this weight: b + E[W x] - W~ E[x^]."""
        shift = self.mean_y - torch.einsum("gd,god->go", self.mean_x, matrix(self.layer, weight.float()))
        return self.layer.bias.detach().float() + shift.flatten()  # type: ignore[union-attr,operator]

    def loss(self, weight: Tensor, batch: int = 0, generator: torch.Generator | None = None) -> Tensor:
        """The error over everything that was added; nothing is drawn."""
        w = matrix(self.layer, weight)
        return (torch.bmm(w, self.h) * w).sum() - 2 * (self.p * w).sum() + self.yy

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """The same as a number; zero or above."""
        w = matrix(self.layer, weight).double()
        value = (torch.bmm(w, self.h.double()) * w).sum() - 2 * (self.p.double() * w).sum() + self.yy
        return max(0.0, float(value))


class Calls:
    """The layer itself on whole batches: for transposed and 3-d convolutions; their bias is left as it is."""

    correct_bias = False

    def __init__(self, layer: nn.Module, activation: Activation | None):
        self.layer, self.f = layer, activation or (lambda y: y)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, quantized: Tensor, weight: Tensor, calls: int) -> None:
        """Keeps one call of the layer."""
        with torch.no_grad():
            self.pairs.append((quantized, self.f(self._apply(x, weight))))

    def close(self) -> None:
        """Nothing to do after the last call."""

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, {"weight": weight}, (x,))

    def loss(self, weight: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """The error on one of the batches."""
        x, y = self.pairs[int(torch.randint(len(self.pairs), (1,), generator=generator))]
        return (self.f(self._apply(x, weight)) - y).square().sum(1).mean()

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """The error over all batches."""
        return sum(float((self.f(self._apply(x, weight)) - y).square().sum(1).mean()) for x, y in self.pairs) / len(
            self.pairs
        )


def _parts(layer: nn.Module, x: Tensor) -> int:
    """Samples to unfold at once, so that the memory stays bounded."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return len(x)
    kernel = layer.weight[0, 0].numel() if layer.weight.dim() > 2 else 1
    return max(1, AT_ONCE // max(1, 4 * x[0].numel() * kernel))


def layer_error(
    layer: nn.Module, activation: Activation | None, correct_bias: bool = False, seed: int = 0
) -> Rows | Gram | Calls:
    """The cheapest form for this layer; `correct_bias` needs a bias."""
    correct_bias = correct_bias and layer.bias is not None
    if not unfolds(layer):
        return Calls(layer, activation)
    if activation is None:
        return Gram(layer, correct_bias, seed=seed)
    return Rows(layer, activation, correct_bias, seed=seed)


def row_activation(module: nn.Module) -> Activation:
    """The activation on rows [n, C]: a clip for each channel has them on another axis in the model."""
    bound = getattr(module, "bound", None)
    if bound is None:
        return lambda y: module(y)
    return lambda y: torch.minimum(y.clamp(min=0), bound)
