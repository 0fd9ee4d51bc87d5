"""Distribution correction (PD-Quant, arXiv:2212.07048, section 3.3): inputs moved towards the batch norms' statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.graph.fold import FoldedNorm, statistics_of


@torch.enable_grad()
def correct(
    model: nn.Module, layers: list[str], run: Callable[[Tensor], Any], x: Tensor, weight: float, steps: int, lr: float
) -> Tensor:
    """`x` after `steps` Adam steps on eq. 8: how far mean and deviation over space of each sample lie from the batch norms'.

    Measured in the units before folding: sum over batch norms of (|mu - mean|^2 + |sigma - std|^2) / samples, plus
    |x' - x|^2 / `weight` (sum over channels, mean over the rest), so that a small `weight` holds the input fast. `run`
    computes the float block; `layers` are its layers. Without a folded batch norm among them, `x` comes back as it is.
    """
    norms = {name: norm for name in layers if (norm := statistics_of(model.get_submodule(name))) is not None}
    if not norms or steps < 1:
        return x
    moved = x.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([moved], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        with _outputs(model, norms) as outputs:
            run(moved)
        loss = sum((distance(outputs[name], norm) for name, norm in norms.items()), x.new_zeros(()))
        loss = loss + (moved - x).square().sum(1).mean() / weight
        loss.backward()
        optimizer.step()
    return moved.detach()


def distance(y: Tensor, norm: FoldedNorm) -> Tensor:
    """How far the statistics of a folded convolution's output [N, C, ...] lie from the batch norm's, per sample."""
    assert norm.mean is not None and norm.std is not None and norm.gain is not None
    gain = torch.where(norm.gain.abs() > 1e-8, norm.gain, torch.ones_like(norm.gain))
    flat = y.float().flatten(2)
    mean = (flat.mean(2) - norm.mean) / gain
    std = (flat.var(2, correction=0) / gain.square() + 1e-6).sqrt()
    wanted = ((norm.std / gain).square() + 1e-6).sqrt()
    return (mean.square().sum() + (std - wanted).square().sum()) / len(y)


class _outputs:
    """Inside, the outputs of some layers by name."""

    def __init__(self, model: nn.Module, names: Mapping[str, Any]):
        self.model, self.names, self.seen = model, names, {}

    def __enter__(self) -> dict[str, Tensor]:
        def keep(name: str) -> Callable[..., None]:
            return lambda _, __, output: self.seen.__setitem__(name, output)

        self.handles = [self.model.get_submodule(n).register_forward_hook(keep(n)) for n in self.names]
        return self.seen

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
