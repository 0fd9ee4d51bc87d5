"""Differentiable k-means (DKM, Cho et al. 2022, arXiv:2108.12659) with the implicit gradient of its fixed point.

Soft clustering repeats C <- mean of the weights under the attention softmax(-|w - c|² / tau), until nothing moves; the
layer computes with W~ = A C. The backward pass is that of the fixed point (IDKM, arXiv:2312.07759): a (k d) x (k d)
linear solve, so that no attention map is ever stored, however many iterations the forward pass took.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, said_of, straight_through
from hf_r2.encoders.kmeans import kmeans_scalar, nearest_scalar
from hf_r2.spec import LayerSpec

logger = logging.getLogger(__name__)

CHUNK = 1 << 15  # rows of attention computed at once: stays in cache, bounds the memory
BINS = 1 << 16  # beyond twice as many scalars, the fixed point is sought on a histogram of the weights
LOWEST_LOGIT = -80.0  # exp of less is a denormal number, which is slow and means nothing
SINGULAR = 1e10  # condition number of I - dF/dC from which the solve is not trusted


def soft_cluster(
    w: Tensor, centroids: Tensor, tau: float, max_iter: int = 100, tol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Soft-clustered weights [m, d] and the centroids [k, d] they are made of.

    `w` [m, d]; `centroids` [k, d], where the iteration starts; `tau` > 0 in units of squared distance; the iteration
    stops after `max_iter` steps, or when no centroid moved by more than `tol` times the standard deviation of `w`.
    Both results are differentiable in `w`, at the fixed point (ALGORITHMS 2.7). Above 131,072 scalar weights the fixed
    point is that of a histogram of 65,536 bins with their true means.

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
    return _SoftCluster.apply(w, centroids.detach(), float(tau), max_iter, tol)  # type: ignore[return-value]


def attention(w: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Rows softmax(-|w_i - c_j|² / tau), [m, k]; the term |w_i|² cancels."""
    logits = (2 * w @ centroids.T - centroids.square().sum(1)) / tau
    logits = (logits - logits.amax(1, keepdim=True)).clamp(min=LOWEST_LOGIT)
    return torch.softmax(logits, dim=1)


def _chunks(w: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, w.shape[0], CHUNK):
        yield tuple(t[start : start + CHUNK] for t in (w, *others))


def _points(w: Tensor) -> tuple[Tensor, Tensor]:
    """Points [n, d] and their masses [n, 1] with the same fixed point as `w`: itself, or bins of very many scalars."""
    if w.shape[1] > 1 or w.shape[0] <= 2 * BINS:
        return w, w.new_ones(w.shape[0], 1)
    low, high = w.aminmax()
    index = ((w[:, 0] - low) * ((BINS - 1) / (high - low).clamp(min=1e-30))).to(torch.int32).clamp(0, BINS - 1)
    mass = torch.bincount(index, minlength=BINS)
    total = torch.bincount(index, weights=w[:, 0].double(), minlength=BINS)
    held = mass > 0
    return (total[held] / mass[held]).to(w.dtype)[:, None], mass[held].to(w.dtype)[:, None]


def _step(points: Tensor, mass: Tensor, centroids: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One update: the new centroids [k, d] and the attention they drew, [k]. A centroid that draws none stays."""
    drawn, total = centroids.new_zeros(centroids.shape[0]), torch.zeros_like(centroids)
    for p, m in _chunks(points, mass):
        a = attention(p, centroids, tau) * m
        drawn += a.sum(0)
        total += a.T @ p
    floor = torch.finfo(drawn.dtype).tiny ** 0.5
    return torch.where(drawn[:, None] > floor, total / drawn.clamp(min=floor)[:, None], centroids), drawn


def _fixed_point(points: Tensor, mass: Tensor, centroids: Tensor, tau: float, max_iter: int, tol: float) -> Tensor:
    mean = (points * mass).sum(0) / mass.sum()
    std = (((points - mean).square() * mass).sum() / mass.sum()).sqrt()
    for _ in range(max_iter):
        moved, _ = _step(points, mass, centroids, tau)
        distance = (moved - centroids).abs().max()
        centroids = moved
        if distance <= tol * std:
            break
    return centroids


def _jacobian(points: Tensor, mass: Tensor, centroids: Tensor, drawn: Tensor, tau: float) -> Tensor:
    """dF/dC at the fixed point, [k d, k d] in float64 (ALGORITHMS 2.7, with F = C)."""
    k, d = centroids.shape
    same = centroids.new_zeros(k, d, d, dtype=torch.float64)
    cross = centroids.new_zeros(k * d, k * d, dtype=torch.float64)
    for p, m in _chunks(points, mass):
        a = attention(p, centroids, tau)
        offset = p[:, None, :] - centroids  # [n, k, d]
        weighted = (a[:, :, None] * offset).double()
        same += torch.einsum("nkd,nke->kde", weighted * m[:, :, None].double(), offset.double())
        flat = weighted.flatten(1)
        cross += (flat * m.double()).T @ flat
    jacobian = torch.block_diag(*same) - cross
    return jacobian * (2 / tau) / drawn.double().clamp(min=1e-30).repeat_interleave(d)[:, None]


def _solve(jacobian: Tensor, g: Tensor) -> Tensor:
    """(I - J)^-T g, [k, d]; where that is near singular (tau close to the critical value), g: one unrolled step."""
    system = torch.eye(jacobian.shape[0], dtype=jacobian.dtype, device=jacobian.device) - jacobian
    if not torch.isfinite(system).all() or float(torch.linalg.cond(system)) > SINGULAR:
        logger.warning("DKM: tau is close to the critical value of a layer; the gradient of one unrolled step is used")
        return g
    return torch.linalg.solve(system.T, g.double().flatten()).view_as(g).to(g.dtype)


class _SoftCluster(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, centroids, tau, max_iter, tol):
        points, mass = _points(w)
        centroids = _fixed_point(points, mass, centroids.to(w.dtype), tau, max_iter, tol)
        soft = torch.cat([attention(p, centroids, tau) @ centroids for (p,) in _chunks(w)])
        ctx.save_for_backward(w, centroids)
        ctx.tau = tau
        return soft, centroids

    @staticmethod
    def backward(ctx, grad_soft, grad_centroids):
        w, c = ctx.saved_tensors
        tau = ctx.tau
        g = grad_centroids.clone()
        direct = torch.empty_like(w)
        for p, grad, out in _chunks(w, grad_soft, direct):
            a = attention(p, c, tau)
            h = grad @ c.T
            b = a * (h - (a * h).sum(1, keepdim=True))
            out.copy_((2 / tau) * (b @ c))
            g += a.T @ grad + (2 / tau) * (b.T @ p - b.sum(0)[:, None] * c)
        points, mass = _points(w)
        _, drawn = _step(points, mass, c, tau)
        u = _solve(_jacobian(points, mass, c, drawn, tau), g) / drawn.clamp(min=1e-30)[:, None]
        for p, out in _chunks(w, direct):
            a = attention(p, c, tau)
            v = p @ u.T - (u * c).sum(1)
            out += a @ u + (2 / tau) * ((a * (v - (a * v).sum(1, keepdim=True))) @ c)
        return direct, None, None, None, None


@dataclass(frozen=True, kw_only=True)
class DKMOptions:
    """Options of `DKM`; raises ValueError for a value that makes no sense.

    `tau`: the temperature, in units of the weight's variance (from 2 on everything collapses into the mean: ALGORITHMS
    2.2), or of squared weights with `tau_units="absolute"`. `max_iter` and `tol` as in `soft_cluster`. `seed` of the
    k-means++ start.
    """

    tau: float = 0.1
    tau_units: str = "variance"
    max_iter: int = 100
    tol: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.tau, (int, float)) and self.tau > 0 and math.isfinite(self.tau)):
            raise ValueError(f"tau must be a positive number, got {self.tau!r}")
        if self.tau_units not in ("variance", "absolute"):
            raise ValueError(f"tau_units must be 'variance' or 'absolute', got {self.tau_units!r}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")


class DKM(nn.Module):
    """Clusters a weight into 2**bits scalars: softly while training, by nearest centroid in eval mode.

    Buffer `centroids` [2**bits, 1], float32, ascending, warm-started from step to step. Options: `DKMOptions`.
    """

    centroids: Tensor

    def __init__(self, weight: Tensor, spec: LayerSpec, axis: int = 0):
        super().__init__()
        self.bits = spec.weight_bits
        self.options = DKMOptions(**spec.options)
        k = 2**self.bits
        start = torch.zeros(k) if weight.is_meta else kmeans_scalar(weight.detach(), k, seed=self.options.seed)
        self.register_buffer("centroids", start[:, None].clone())

    def encode(self, w: Tensor) -> Encoded:
        """Codes of the nearest centroid for each weight, and the centroids."""
        codes = nearest_scalar(w.detach().float(), self.centroids[:, 0])
        return Encoded(codes, self.bits, centroids=self.centroids)

    def forward(self, w: Tensor) -> Tensor:
        """The clustered weight, in the shape and dtype of `w`; in training mode the centroids move along."""
        if not self.training:
            with torch.no_grad():
                value = self.encode(w).decode()
            return straight_through(w, value)
        flat = w.float().reshape(-1, 1)
        if flat.numel() == 0:
            return w
        low, high = flat.detach().aminmax()
        if not torch.isfinite(high - low):
            raise ValueError(f"{said_of(self)} holds NaN or infinity; lower the learning rate")
        if low == high:  # all weights equal: they are their own centroid
            return w
        tau = self._tau(flat.detach())
        soft, centroids = soft_cluster(flat, self.centroids, tau, self.options.max_iter, self.options.tol)
        with torch.no_grad():
            self.centroids.copy_(centroids.detach().sort(dim=0).values)
        return soft.view_as(w).to(w.dtype)

    def _tau(self, flat: Tensor) -> float:
        """The temperature in squared weights."""
        unit = 1.0 if self.options.tau_units == "absolute" else float(flat.var(correction=0))
        return self.options.tau * unit
