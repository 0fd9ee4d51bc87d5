"""Differentiable k-means (DKM, Cho et al. 2022, arXiv:2108.12659) of scalars or vectors, as a weight encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, said_of, straight_through
from hf_r2.encoders.kmeans import kmeans_scalar, kmeans_vectors, nearest_scalar, nearest_vector
from hf_r2.encoders.soft_cluster import SoftCluster
from hf_r2.encoders.soft_scalars import Nodes, SoftScalars
from hf_r2.spec import LayerSpec
from hf_r2.vectors import from_columns, to_columns, to_vectors

MANY = 1 << 16  # scalars from which tables pay
DEAD = 0.5  # vectors' worth of attention below which a centroid is taken to be of no use


def soft_cluster(
    w: Tensor, centroids: Tensor, tau: float, max_iter: int = 100, tol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Soft-clustered weights [m, d] and the centroids [k, d] they are made of.

    `w` [m, d]; `centroids` [k, d], where the iteration starts; `tau` > 0 in units of squared distance; the iteration
    stops after `max_iter` steps, or when no centroid moved by more than `tol` times the standard deviation of `w`.
    Both results are differentiable in `w`, at the fixed point (ALGORITHMS 2.7). Above 65,536 scalars the fixed point is
    that of a histogram with the bins' true means, and weights and gradients are interpolated (`SoftScalars`), unless `tau`
    is so small that this would show.

    Raises ValueError for a tau that is not positive, or shapes that do not fit.
    """
    if w.dim() != 2 or centroids.dim() != 2 or w.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"w [m, d] and centroids [k, d] must share d, got {list(w.shape)} and {list(centroids.shape)}"
        )
    if not tau > 0 or not math.isfinite(tau):
        raise ValueError(f"tau must be a positive number (squared distance), got {tau}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    soft, centroids, _ = _clustered(w.T[None], centroids, float(tau), max_iter, tol * variance(w.detach()) ** 0.5)
    return soft[0].T, centroids


def soft_weight(w: Tensor, start: Tensor, tau: float, max_iter: int, still: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `soft_cluster`, for a weight of any shape as vectors (`to_columns`), what fills no vector left as it is.

    `still` is the tolerance in units of the weight. Returns the soft weight, the centroids and what each drew, [k].
    """
    columns, rest = to_columns(w, start.shape[1])
    soft, centroids, drawn = _clustered(columns, start, tau, max_iter, still)
    return from_columns(soft, rest, w.shape), centroids, drawn


def _clustered(w: Tensor, start: Tensor, tau: float, max_iter: int, still: float) -> tuple[Tensor, Tensor, Tensor]:
    """Soft clustering of columns [b, d, n] by what suits them."""
    start = start.detach().to(w.dtype)
    if w.shape[1] == 1 and w.numel() > MANY:
        flat = w.reshape(-1, 1)
        nodes = Nodes.over(flat.detach()[:, 0], start, tau)
        if nodes is not None:
            soft, centroids, drawn = SoftScalars.apply(flat, start, tau, max_iter, still, nodes)  # type: ignore[misc]
            return soft.view(w.shape), centroids, drawn
    return SoftCluster.apply(w, start, tau, max_iter, still)  # type: ignore[return-value]


def variance(w: Tensor) -> float:
    """Population variance of all elements; two fast passes, a slow one where these would cancel."""
    flat = w.reshape(-1)
    mean, square = float(flat.mean()), float(torch.dot(flat, flat)) / max(flat.numel(), 1)
    fast = square - mean * mean
    return fast if fast > 1e-2 * square else float(flat.var(correction=0))


@dataclass(frozen=True, kw_only=True)
class DKMOptions:
    """Options of `DKM`; raises ValueError for a value that makes no sense.

    `dim`: cluster vectors of so many neighbours along the first axis (`to_vectors`); `weight_bits` is then the width of a
    vector's code. `tau`: the temperature, in units of the weight's variance, or of squared weights with
    `tau_units="absolute"`. A cluster splits no more where tau exceeds twice the largest variance in it (ALGORITHMS 2.2), and
    the variance in one of k clusters of a Gaussian is about 2.7 k**(-2 / dim) of the whole. The default is 1.6 k**(-2 / dim),
    but at most 0.1, as what is trained softly is rounded in the end: 0.1 for 1 and 2 bits, 0.006 for 4.
    `max_iter` and `tol` as in `soft_cluster`. `seed` of the k-means++ start of vectors.
    """

    dim: int = 1
    tau: float | None = None
    tau_units: str = "variance"
    max_iter: int = 100
    tol: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"dim must be an integer of at least 1, got {self.dim!r}")
        given = isinstance(self.tau, (int, float)) and self.tau > 0 and math.isfinite(self.tau)
        if self.tau is None and self.tau_units == "absolute":
            raise ValueError("tau_units='absolute' needs a tau, in squared weights")
        if self.tau is not None and not given:
            raise ValueError(f"tau must be a positive number, got {self.tau!r}")
        if self.tau_units not in ("variance", "absolute"):
            raise ValueError(f"tau_units must be 'variance' or 'absolute', got {self.tau_units!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")


def default_tau(k: int, dim: int) -> float:
    """Temperature for k clusters of vectors of this length, in units of the weight's variance (see `DKMOptions`)."""
    return min(0.1, 1.6 * k ** (-2 / dim))


class DKM(nn.Module):
    """Clusters a weight into 2**bits scalars or vectors: softly while training, by nearest centroid in eval mode.

    Buffer `centroids` [2**bits, dim], float32 (scalars ascending), warm-started from step to step. One that draws no
    weight any more starts anew beside the one that draws most. The up to dim - 1 elements that fill no vector stay float.
    Options: `DKMOptions`.
    """

    centroids: Tensor

    def __init__(self, weight: Tensor, spec: LayerSpec, axis: int = 0):
        super().__init__()
        self.bits = spec.weight_bits
        self.options = DKMOptions(**spec.options)
        k, d = 2**self.bits, self.options.dim
        start = torch.zeros(k, d)
        if not weight.is_meta:
            vectors = to_vectors(weight.detach().float(), d)[0]
            found = (
                kmeans_scalar(vectors, k)[:, None] if d == 1 else kmeans_vectors(vectors, k, seed=self.options.seed)
            )
            start = found.clone()
        self.register_buffer("centroids", start)

    def encode(self, w: Tensor) -> Encoded:
        """Codes of the nearest centroid for each weight or vector, the centroids, and what fills no vector."""
        if self.options.dim == 1:
            codes = nearest_scalar(w.detach().float(), self.centroids[:, 0])
            return Encoded(codes, self.bits, centroids=self.centroids)
        vectors, rest = to_vectors(w.detach().float(), self.options.dim)
        codes = nearest_vector(vectors, self.centroids)
        return Encoded(codes, self.bits, centroids=self.centroids, rest=rest.clone(), shape=tuple(w.shape))

    def forward(self, w: Tensor) -> Tensor:
        """The clustered weight, in the shape and dtype of `w`; in training mode the centroids move along."""
        if not self.training:
            with torch.no_grad():
                value = self.encode(w).decode()
            return straight_through(w, value)
        x = w.float()
        if x.numel() < self.options.dim or x.numel() == 0:
            return w
        low, high = x.detach().aminmax()
        if not torch.isfinite(high - low):
            raise ValueError(f"{said_of(self)} holds NaN or infinity; lower the learning rate")
        if low == high:  # all weights equal: they are their own centroid
            return w
        o, spread = self.options, variance(x.detach())
        tau = default_tau(len(self.centroids), o.dim) if o.tau is None else o.tau
        tau *= 1.0 if o.tau_units == "absolute" else spread
        soft, centroids, drawn = soft_weight(x, self.centroids, tau, o.max_iter, o.tol * spread**0.5)
        with torch.no_grad():
            moved = revived(centroids.detach(), drawn, spread)
            self.centroids.copy_(moved.sort(dim=0).values if o.dim == 1 else moved)
        return soft.to(w.dtype)


def revived(centroids: Tensor, drawn: Tensor, spread: float) -> Tensor:
    """`centroids` [k, d], those that drew next to no attention moved beside those that drew most."""
    dead = drawn < DEAD
    if not bool(dead.any()):
        return centroids
    order, moved = drawn.argsort(descending=True), centroids.clone()
    for place, j in enumerate(dead.nonzero()[:, 0].tolist()):
        largest = int(order[place % max(int((~dead).sum()), 1)])
        moved[j] = centroids[largest] + 0.1 * spread**0.5
    return moved
