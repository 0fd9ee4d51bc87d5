"""AdaRound's relaxation (arXiv:2004.10568): a rounding up or down that is learned through a rectified sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.encoders.affine import Affine

ZETA, GAMMA = 1.1, -0.1  # eq. 23: the sigmoid is stretched, so that 0 and 1 are reached


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) in [0, 1] (eq. 23); flat for |V| >= ln 11."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def start(fraction: Tensor) -> Tensor:
    """V with h(V) = `fraction` in [0, 1): training starts at the float weight."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """sum(1 - |2 h - 1|^beta) (eq. 24): zero where every rounding is decided."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed_beta(progress: float, beta: tuple[float, float], warmup: float) -> float | None:
    """Beta at `progress` in [0, 1] of the iterations, linear from beta[0] to beta[1]; None while the regularizer is off."""
    if progress < warmup:
        return None
    return beta[1] + (beta[0] - beta[1]) * max(0.0, 1 - (progress - warmup) / max(1 - warmup, 1e-12))


class Rounding(nn.Module):
    """The learned rounding of one weight on the grid of its encoder, whose scale and zero point stay.

    Stands in for the encoder while it is trained: `forward` gives the weight between two levels, differentiable in the
    parameter `v` (in the weight's shape), which starts at the float weight unless it is given.
    """

    floor: Tensor

    def __init__(self, weight: Tensor, encoder: Affine, v: Tensor | None = None):
        super().__init__()
        self.encoder = encoder
        scale = torch.where(encoder.scale > 0, encoder.scale, torch.ones_like(encoder.scale))
        position = weight.detach().float() / scale + encoder.zero_point
        self.register_buffer("floor", position.floor())
        self.v = nn.Parameter(start((position - self.floor).clamp(0, 1 - 1e-6)) if v is None else v)

    def soft(self) -> Tensor:
        """The weight between two levels, float32; clipped weights have no gradient."""
        grid = self.encoder.grid
        codes = (self.floor + rectified_sigmoid(self.v)).clamp(grid.qmin, grid.qmax)
        return (codes - self.encoder.zero_point) * self.encoder.scale

    def forward(self, w: Tensor) -> Tensor:
        """The same, in the dtype of `w`."""
        return self.soft().to(w.dtype)

    def penalty(self, beta: float) -> Tensor:
        """The regularizer of this weight."""
        return regularizer(rectified_sigmoid(self.v), beta)

    def codes(self) -> Tensor:
        """The decided codes: up where h(V) >= 1/2, that is V >= 0."""
        grid = self.encoder.grid
        return (self.floor + (self.v >= 0)).clamp(grid.qmin, grid.qmax).to(torch.uint8)
