"""Weights rounded by one encoder, and corrected by a low-rank adapter: while its rank is searched, and once it is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, straight_through
from hf_r2.lowrank import LowRank, fold


class Adapted(nn.Module):
    """The codes of `encoder`, and the `adapter` beside them; the identity's gradient."""

    def __init__(self, encoder: nn.Module, adapter: LowRank):
        super().__init__()
        self.encoder, self.adapter = encoder, adapter

    def encode(self, w: Tensor) -> Encoded:
        """What `encoder` makes of `w`, with the adapter."""
        return replace(self.encoder.encode(w), adapter=self.adapter)  # type: ignore[operator]

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight with the adapter added, in the dtype of `w`."""
        with torch.no_grad():
            value = self.encode(w).decode()
        return straight_through(w, value)


class Filtered(nn.Module):
    """The rounded weight plus its residual's singular components, filtered; differentiable in `log_cutoff` alone.

    Component i (from 0) stands at rank i + 1/2 and passes with phi(i)**2, phi the Butterworth kernel of `butterworth`: both
    factors are multiplied by it (CoRa, arXiv:2408.00923). `log_cutoff`, a scalar, is the logarithm of the cut-off rank.
    `left` [m, R], its columns times the singular values, and `right` [R, n] are the residual's components.
    """

    rounded: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, rounded: Tensor, left: Tensor, right: Tensor, kernel: str, order: int, cutoff: float):
        super().__init__()
        self.kernel, self.order = kernel, order
        for name, tensor in (("rounded", rounded), ("left", left), ("right", right)):
            self.register_buffer(name, tensor.detach(), persistent=False)
        self.log_cutoff = nn.Parameter(torch.tensor(cutoff, device=rounded.device).log())

    def gain(self) -> Tensor:
        """What is left of each component, [R]."""
        return (
            butterworth(torch.arange(self.left.shape[1], device=self.left.device) + 0.5, self.log_cutoff, self.order)
            ** 2
        )

    def forward(self, w: Tensor) -> Tensor:
        """The weight, in the dtype and shape of `w`."""
        low_rank = (self.left * self.gain()) @ self.right
        return (self.rounded + fold(low_rank, self.kernel, w.shape)).to(w.dtype)


def butterworth(rank: Tensor, log_cutoff: Tensor, order: int) -> Tensor:
    """(1 + (rank / cutoff)**(2 order))**(-1/2), in (0, 1]: the normalised Butterworth kernel, differentiable in the cut-off.

    In logarithms, so that no power overflows and no gradient is NaN.
    """
    return torch.exp(-0.5 * nn.functional.softplus(2 * order * (rank.log() - log_cutoff)))
