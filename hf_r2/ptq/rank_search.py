"""The ranks of the adapters, found by gradient: one cut-off for each layer (CoRa, arXiv:2408.00923)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_r2.encoders.adapted import Filtered
from hf_r2.ptq.residual import Residual

LOWEST = 0.25  # of a cut-off: the first component, at rank 1/2, then passes with 0.4 % at order 4
FAR = 20.0  # where the penalty goes on as a line: its exponential would overflow
STEEPNESS = 10.0  # of the budget's penalty: at 20 % over it has grown by e^2


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of the loop; see `cora_`."""

    iters: int
    lr: float
    gamma: float
    progress: bool


@dataclass(frozen=True)
class Found:
    """Cut-off ranks, not yet integers, and the loss of every step, the budget's penalty left out."""

    cutoffs: list[float]
    losses: list[float]


def over_budget(used: Tensor, gamma: float) -> Tensor:
    """gamma * exp(relu(STEEPNESS * (used - 1))): the penalty for the share `used` of the budget; a line far beyond it."""
    over = torch.relu(STEEPNESS * (used - 1))
    return gamma * torch.exp(over.clamp(max=FAR)) * (1 + torch.relu(over - FAR))


@torch.enable_grad()
def search_cutoffs(
    filters: Sequence[Filtered],
    residuals: Sequence[Residual],
    loss_of: Callable[[int], Tensor],
    numbers: float,
    settings: SearchSettings,
) -> Found:
    """Adam on the logarithms of the cut-offs of `filters`, which stand in the model, from where they are.

    `loss_of(step)` runs the model on the step's batch. `numbers`: what the adapters may take. The penalty is in units of the
    first loss, so that it neither drowns the loss nor drowns in it. Logarithms: cut-offs of a few ranks of a thousand are
    reached, and left, as fast as any other. The learning rate falls to nothing over a quarter wave.
    """
    cutoffs: list[Tensor] = [f.log_cutoff for f in filters]
    costs = torch.tensor([r.cost / numbers for r in residuals], device=cutoffs[0].device)
    highest = torch.tensor([math.log(r.full_rank) for r in residuals], device=cutoffs[0].device)
    optimizer = torch.optim.Adam(cutoffs, lr=settings.lr, betas=(0.9, 0.99))
    losses: list[float] = []
    for step in tqdm(range(settings.iters), desc="cora", unit="step", disable=not settings.progress):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * math.cos(0.5 * math.pi * step / settings.iters)
        optimizer.zero_grad()
        loss = loss_of(step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"cora: the loss is {losses[-1]} at step {step}: the rounded model's output overflows")
        used = (torch.stack(cutoffs).exp() * costs).sum()
        (loss + over_budget(used, settings.gamma * max(losses[0], 1e-12) / STEEPNESS)).backward()
        optimizer.step()
        with torch.no_grad():
            for cutoff, top in zip(cutoffs, highest, strict=True):
                cutoff.clamp_(math.log(LOWEST), max(float(top), math.log(LOWEST)))
    return Found([float(c.detach().exp()) for c in cutoffs], losses)
