"""What rounding took from a weight, as singular components, and what they cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[reportPrivateImportUsage]

from hf_r2.lowrank import cheaper_side, unfold

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """Singular components of W - Q(W) of a layer, the largest first: `left` [m, R], `values` [R], `right` [R, n].

    Their sum over i, left[:, i] values[i] right[i], is the residual. In the metric of the inputs, rows of `right` are not of
    length one, and the values are those of the output's error.

    `kernel`: the side of the factors that the weight's kernel is on (`hf_r2.lowrank`). `numel`: weights of the layer.
    """

    name: str
    kernel: str
    left: Tensor
    values: Tensor
    right: Tensor
    numel: int

    @property
    def cost(self) -> int:
        """Numbers that one rank takes: m + n."""
        return self.left.shape[0] + self.right.shape[1]

    @property
    def full_rank(self) -> int:
        """Components that there are: the largest rank."""
        return len(self.values)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """[m, rank] and [rank, n], both of equal size in every rank (U S^(1/2) and S^(1/2) V^T), to be stored in few bits."""
        size = self.right[:rank].norm(dim=1).clamp(min=1e-30)
        root = (self.values[:rank] * size).sqrt()
        return self.left[:, :rank] * root, (root / size)[:, None] * self.right[:rank]


@torch.no_grad()
def factorize(name: str, residual: Tensor, root: Tensor | None = None) -> Residual | None:
    """The singular components of the residual [d0, d1, ...] of layer `name`; None for a residual of zeros.

    With `root`, L [n, n] lower triangular, those of residual L, times the inverse of L: the first r of them are then what
    leaves the least error E|(W - W_r) x|^2 for E[x x'] = L L' (Eckart and Young), not the least |W - W_r|^2.

    One singular value decomposition, of the unfolding with the smaller cost. Components that are zero to the precision of
    the values are left out. Where the decomposition does not converge, it is had from the eigenvectors of the smaller Gram
    matrix in float64; the log names the layer.

    Raises ValueError, naming the layer, for NaN or infinity, and where that does not converge either.
    """
    if not torch.isfinite(residual).all():
        raise ValueError(f"the residual of layer {name!r} holds NaN or infinity; it cannot be factorized")
    kernel = cheaper_side(residual.shape)
    matrix = unfold(residual, kernel)
    if not matrix.any():
        return None
    if root is not None:
        root = root.to(matrix.dtype)
        matrix = matrix @ root
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except LinAlgError as error:
        logger.warning("cora: the SVD of layer %s did not converge (%s); by eigenvectors instead", name, error)
        left, values, right = _by_eigenvectors(name, matrix)
    rank = (
        int((values > values.max() * torch.finfo(values.dtype).eps * max(matrix.shape)).sum()) if values.numel() else 0
    )
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return Residual(name, kernel, left[:, :rank], values[:rank], right[:rank], residual.numel())


def _by_eigenvectors(name: str, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.linalg.svd(matrix, full_matrices=False)`, with half of the digits; zero components where a value is zero."""
    wide = matrix.shape[0] <= matrix.shape[1]
    exact = matrix.double() if wide else matrix.double().T
    try:
        squares, vectors = torch.linalg.eigh(exact @ exact.T)
    except LinAlgError as error:
        raise ValueError(
            f"the residual of layer {name!r} cannot be factorized: {error}; leave it out with skip"
        ) from error
    values, left = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    right = torch.where(values[:, None] > 0, (left.T @ exact) / values.clamp(min=1e-300)[:, None], 0.0)
    ends = (left, right) if wide else (right.T, left.T)
    return ends[0].to(matrix.dtype), values.to(matrix.dtype), ends[1].to(matrix.dtype)


def equal_share(residuals: Sequence[Residual], share: float) -> list[float]:
    """The heuristic: ranks, not yet integers, at which each adapter takes the same share of its layer's weights."""
    return [share * r.numel / r.cost for r in residuals]


def spend(wanted: Sequence[float], residuals: Sequence[Residual], numbers: float) -> list[int]:
    """Integer ranks in proportion to those `wanted`, 0 to full, whose adapters take at most `numbers` numbers together.

    The wanted ranks are scaled by one factor so that, rounded down, they fit; what is left is spent on the ranks that
    rounding cut most, until no further rank of any layer fits.
    """
    most = [r.full_rank for r in residuals]
    low, high = 0.0, max((m / w for w, m in zip(wanted, most, strict=True) if w > 0), default=0.0)
    for _ in range(60):  # bisection: to the last bit of the factor
        middle = (low + high) / 2
        fits = _cost(_floor(wanted, most, middle), residuals) <= numbers
        low, high = (middle, high) if fits else (low, middle)
    ranks = _floor(wanted, most, low)
    left = numbers - _cost(ranks, residuals)
    while True:
        short = [(low * w - rank, i) for i, (w, rank) in enumerate(zip(wanted, ranks, strict=True)) if rank < most[i]]
        short = [(lack, i) for lack, i in short if residuals[i].cost <= left]
        if not short:
            return ranks
        chosen = max(short)[1]
        ranks[chosen] += 1
        left -= residuals[chosen].cost


def _floor(wanted: Sequence[float], most: Sequence[int], factor: float) -> list[int]:
    return [min(int(w * factor + 1e-9), m) for w, m in zip(wanted, most, strict=True)]


def _cost(ranks: Sequence[int], residuals: Sequence[Residual]) -> int:
    return sum(rank * r.cost for rank, r in zip(ranks, residuals, strict=True))
