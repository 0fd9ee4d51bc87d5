"""What each weight of a layer is multiplied with on average: how an error of the weight moves the mean of each output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.batches import run_batch
from hf_r2.layers import WeightLayer


def tap_means(
    model: nn.Module, layers: Iterable[WeightLayer], batches: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], list[Any]]:
    """For each of `layers` that has a bias: E[x] at each weight, in the weight's shape, float32; and the outputs for `batches`.

    An error e of the weight adds (e * means) summed over all axes but the first to the mean of each output channel, over
    samples and positions, what padding brings in counted. For layers whose outputs are along the first axis of the weight
    (linear, convolution). The model should be in eval mode; its prepared layers compute with float weights where it is run
    inside `float_weights`. Layers whose input changes its shape from batch to batch (texts) are weighted by their positions.
    """
    chosen = [
        layer for layer in layers if layer.channel_axis == 0 and layer.module._parameters.get("bias") is not None
    ]
    sums: dict[str, dict[torch.Size, tuple[Tensor, int]]] = {layer.name: {} for layer in chosen}
    handles = [layer.module.register_forward_pre_hook(_adder(sums[layer.name], layer.module)) for layer in chosen]
    try:
        with torch.no_grad():
            outputs = [run_batch(model, batch, number) for number, batch in enumerate(batches)]
    finally:
        for handle in handles:
            handle.remove()
    return {layer.name: _at_weights(layer, sums[layer.name]) for layer in chosen if sums[layer.name]}, outputs


def _adder(sums: dict[torch.Size, tuple[Tensor, int]], module: nn.Module) -> Any:
    """A hook that adds up a layer's inputs over the samples; rows of linear layers over all positions too."""

    def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        x = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else x
        total, count = sums.get(x.shape[1:], (torch.zeros((), device=x.device), 0))
        sums[x.shape[1:]] = (total + x.float().sum(0), count + len(x))

    return add


@torch.enable_grad()
def _at_weights(layer: WeightLayer, sums: Mapping[torch.Size, tuple[Tensor, int]]) -> Tensor:
    """The gradient of the mean outputs by the weight: they are linear in it."""
    weight = layer.weight.detach().float().requires_grad_()
    bare, every = layer.module, sum(count for _, count in sums.values())
    bias = torch.zeros_like(layer.module._parameters["bias"], dtype=torch.float32)  # type: ignore[arg-type]
    total = torch.zeros((), device=weight.device)
    for mean, count in ((s / c, c) for s, c in sums.values()):
        out = torch.func.functional_call(bare, {"weight": weight, "bias": bias}, (mean[None],))
        axes = [d for d in range(out.dim()) if d != (out.dim() - 1 if isinstance(bare, nn.Linear) else 1)]
        total = total + out.mean(axes).sum() * (count / every)
    return torch.autograd.grad(total, weight)[0]
