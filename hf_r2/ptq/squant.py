"""SQuant (arXiv:2202.07471): roundings flipped until the errors of every kernel and every channel sum to nearly nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_r2.attach import encoder_of, prepared_layers
from hf_r2.dressed import float_weights
from hf_r2.encoders.affine import Affine
from hf_r2.graph import example_inputs, read_graph
from hf_r2.graph.fold import statistics_of
from hf_r2.graph.statistics import input_statistics
from hf_r2.layers import TRANSPOSED, is_transformers_conv1d
from hf_r2.ptq.bias import correct_by_statistics_


def squant_(
    model: nn.Module, batches: Iterable[Mapping[str, Any]] | None = None, *, bias_correction: str = "analytic"
) -> None:
    """Pins codes for every weight of a prepared model, data-free, on the grids over each weight's minimum and maximum.

    The output error's Hessian is approximated by three blocks: the element, the kernel, the output channel (eq. 7); see
    `flip`. 1-bit symmetric grids and all-zero weights keep their nearest codes. The blocks take all inputs of a kernel and of
    a channel as equal; their means are not, and what that leaves of the mean error is taken off the biases by the
    statistics of folded batch norms, as DFQ does, still data-free. The paper leaves biases alone: `bias_correction="none"`.

    Raises ValueError for another `bias_correction`.
    """
    if bias_correction not in ("none", "analytic"):
        raise ValueError(f"bias_correction must be none or analytic, got {bias_correction!r}")
    done: set[int] = set()
    for layer in prepared_layers(model):
        encoder = encoder_of(layer)
        if id(encoder) in done or not isinstance(encoder, Affine) or layer.weight.numel() == 0:
            continue
        done.add(id(encoder))
        if encoder.grid.bits == 1 and encoder.grid.symmetric:
            continue
        with torch.no_grad():
            scale = torch.where(encoder.scale > 0, encoder.scale, torch.ones_like(encoder.scale))
            position = layer.weight.detach().float() / scale + encoder.zero_point
            kernels = by_kernel(layer.module, position)
            codes = flip(kernels, encoder.grid.qmin, encoder.grid.qmax)
            encoder.set_codes_(from_kernel(layer.module, codes, position.shape))
    if bias_correction == "analytic" and any(statistics_of(layer.module) for layer in prepared_layers(model)):
        with float_weights(model):
            graph = read_graph(model, next(iter(batches)) if batches is not None else example_inputs(model))
        correct_by_statistics_(prepared_layers(model), input_statistics(graph, model))


def by_kernel(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as [output channels, kernels, elements of a kernel]; linear layers have kernels of one element."""
    if is_transformers_conv1d(layer):
        return weight.t()[:, :, None]
    if isinstance(layer, TRANSPOSED):  # [in, out / groups, ...], the inputs of a group one after the other
        groups, inputs = layer.groups, weight.shape[0] // layer.groups
        split = weight.reshape(groups, inputs, weight.shape[1], -1).transpose(1, 2)
        return split.reshape(groups * weight.shape[1], inputs, -1)
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def from_kernel(layer: nn.Module, kernels: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `by_kernel`."""
    if is_transformers_conv1d(layer):
        return kernels[:, :, 0].t().contiguous()
    if isinstance(layer, TRANSPOSED):
        split = kernels.reshape(layer.groups, shape[1], shape[0] // layer.groups, -1).transpose(1, 2)
        return split.reshape(shape)
    return kernels.reshape(shape)


def flip(x: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of weights in grid units `x` [O, K, E] (channels, kernels, elements), uint8.

    From the nearest codes, in each kernel the round(|sum of errors|) elements with the largest error of the sum's sign go
    to the next code (its errors then sum to at most 1/2); then in each channel as many kernels take one step more, or
    back (channel sums at most 1/2, kernel sums at most 1), as far as there are codes within [qmin, qmax] to go to. No
    error exceeds 1. Kernels of one element have no stage of their own: the channel chooses among all elements. Of equal
    errors the first ones go.
    """
    x = x.float()
    codes = x.round().clamp_(qmin, qmax)
    error = codes - x
    if x.shape[2] == 1:
        steps, _ = _flip_rows(error[:, :, 0], codes[:, :, 0], qmin, qmax)
        return codes.add_(steps[:, :, None]).to(torch.uint8)
    steps, spare = _flip_rows(error, codes, qmin, qmax)
    codes += steps
    error += steps
    total = error.sum((1, 2))
    useful = spare.direction == -total.sign()[:, None]  # what a kernel can spare goes one way only
    size = torch.where(useful, spare.size, -1.0)
    chosen = _mark(size, _leading(size, total.abs().round()), total.abs().round())
    codes.scatter_add_(2, spare.place[:, :, None], torch.where(chosen, spare.direction, 0.0)[:, :, None])
    return codes.to(torch.uint8)


class _Spare(NamedTuple):
    """One more step that each row could make: where, in which direction, and how large the error there is (-1: none)."""

    place: Tensor
    direction: Tensor
    size: Tensor


def _flip_rows(error: Tensor, codes: Tensor, qmin: int, qmax: int) -> tuple[Tensor, _Spare]:
    """Steps of -1, 0 or 1 that bring the sums of the rows [..., n] to at most 1/2, and what each row has to spare."""
    total = error.sum(-1)
    sign, wanted = total.sign(), total.abs().round()
    end = torch.full_like(sign, qmax).masked_fill_(sign > 0, qmin)  # codes there have nowhere to go
    size = error * sign[..., None]
    size *= codes != end[..., None]
    leading = _leading(size, wanted)
    # Overshot: the last one flipped may go back, its error is now 1 - |e|. Else the next one may follow, its error is |e|.
    back = (wanted >= total.abs()) & (wanted > 0)
    rank = wanted.long() - back.long()
    place = leading.gather(-1, rank.clamp(max=leading.shape[-1] - 1)[..., None])[..., 0]
    left = size.gather(-1, place[..., None])[..., 0]
    # A rank past the row's end means clipped entries, which come last and have no size.
    spare = _Spare(
        place, torch.where(back, sign, -sign), torch.where(left > 0, torch.where(back, 1 - left, left), -1.0)
    )
    return _mark(size, leading, wanted) * -sign[..., None], spare


def _leading(size: Tensor, count: Tensor) -> Tensor:
    """Indices of the largest entries of each row, largest first, one more than the largest `count` where there are.

    Compared are the bits of a float (they order as the floats do, all negative ones last) with the place behind them, so
    that of equal entries the first leads: a stable sort, at the price of picking few.
    """
    n = size.shape[-1]
    most = min(n, int(count.max()) + 1)
    behind = torch.arange(n, 0, -1, device=size.device)
    return torch.add(behind, size.view(torch.int32).long(), alpha=2**32).topk(most, dim=-1).indices


def _mark(size: Tensor, leading: Tensor, count: Tensor) -> Tensor:
    """True for the first `count` of the `leading` entries of each row, those without a size above zero left out."""
    among = torch.arange(leading.shape[-1], device=size.device) < count[..., None]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, leading, among) & (size > 0)
