"""Where clustering starts: the best scalar clusters by dynamic programming, vectors by k-means++; and nearest centroids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FEW = 1024  # distinct scalars among which every cut is tried
GROUPS = 512  # runs of sorted scalars that the dynamic program cuts between, where there are more
ROUNDS = 2  # of cutting finer around the best cuts
SAMPLE = 1 << 16  # vectors that k-means runs on, where there are more
CHUNK = 1 << 16  # distances at once


def kmeans_scalar(w: Tensor, k: int, *, max_iter: int = 100) -> Tensor:
    """`k` centroids [k], ascending, float32, of the values of `w` (any shape), of least squared error.

    Exact (a dynamic program over the sorted values) up to 1,024 distinct values; beyond, the cuts are the best among those
    between 512 runs of neighbours (4 k if that is more), then among finer ones around them, and Lloyd steps over all values
    follow. Where `w` holds at most `k` distinct values these are the centroids. Empty weights give zeros.
    """
    values = _sorted(w.detach().flatten())
    if values.numel() == 0:
        return torch.zeros(k, device=w.device)
    starts = torch.cat([values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]])
    distinct = int(starts.count_nonzero())
    if distinct <= k:
        found = values[starts]
        return torch.cat([found, found[-1:].expand(k - distinct)]).float()
    sums = torch.zeros(len(values) + 1, dtype=torch.float64, device=w.device)
    torch.cumsum(values, 0, dtype=torch.float64, out=sums[1:])
    groups = max(GROUPS, 4 * k)
    if distinct <= FEW:
        edges = _best_cuts(
            torch.cat([starts.nonzero()[:, 0], starts.new_tensor([len(starts)], dtype=torch.int64)]), sums, k
        )
    else:
        tried = _runs(values, groups)
        edges = _best_cuts(tried, sums, k)
        for _ in range(ROUNDS):
            finer = _around(edges, tried, max(GROUPS // 2, 4 * k))
            if torch.equal(finer, tried):
                break
            tried, edges = finer, _best_cuts(finer, sums, k)
    return _lloyd(values, sums, sums[edges].diff() / edges.diff(), max_iter).float()


def _sorted(values: Tensor) -> Tensor:
    """Sorted, in at least float32; on the CPU by NumPy, which needs 1/30 of the time that PyTorch does."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort().values


def _runs(values: Tensor, groups: int) -> Tensor:
    """Edges of runs of sorted values: half of equal mass, half of equal width, so that tails are cut too."""
    half, options = groups // 2 + 1, {"device": values.device, "dtype": torch.float64}
    equal = torch.linspace(0, values.numel(), half, **options).round().long()
    places = values[0] + (values[-1] - values[0]) * torch.linspace(0, 1, half, **options)[1:-1]
    return torch.cat([equal, torch.searchsorted(values, places.to(values.dtype))]).unique()


def _around(cuts: Tensor, edges: Tensor, groups: int) -> Tensor:
    """Edges close to the `cuts` [k + 1], between the neighbours that these had among `edges`."""
    place = torch.searchsorted(edges, cuts[1:-1])
    low, high = edges[place - 1], edges[place + 1]
    steps = torch.linspace(0, 1, max(groups // max(len(place), 1), 3), device=edges.device, dtype=torch.float64)
    between = (low[:, None] + (high - low)[:, None] * steps).round().long()
    return torch.cat([cuts, between.flatten()]).unique()


def _best_cuts(edges: Tensor, sums: Tensor, k: int) -> Tensor:
    """Edges [k + 1] of the k clusters of least squared error among all cuts at `edges` [n + 1] (k <= n).

    The squared error is the sum of squares, which no cut changes, less total² / count of each cluster: that is what counts.
    """
    totals = sums[edges] - sums[-1] / (len(sums) - 1) * edges  # about the mean, so that nothing cancels
    cost = (totals[:, None] - totals).square_().div_((edges[:, None] - edges).clamp_(min=1)).neg_()
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).triu(), float("inf"))  # [end, start] of one cluster
    best, cuts = cost[:, 0], []
    for _ in range(k - 2):
        best, cut = (cost + best).min(1)
        cuts.append(cut)
    ends = [len(edges) - 1]
    if k > 1:
        ends.append(int((cost[-1] + best).argmin()))
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    return edges[torch.tensor([0, *reversed(ends)], device=edges.device)]


def _lloyd(values: Tensor, sums: Tensor, centroids: Tensor, max_iter: int) -> Tensor:
    """Lloyd steps over sorted values with prefix sums, until nothing moves: a step costs k binary searches.

    A cluster that lost all its weights stays where it is: it can win some back later.
    """
    bounds = None
    for _ in range(max_iter):
        inner = torch.searchsorted(values, ((centroids[1:] + centroids[:-1]) / 2).to(values.dtype))
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), values.numel())])
        if bounds is not None and torch.equal(edges, bounds):
            break
        bounds = edges
        counts = edges.diff()
        centroids = torch.where(counts > 0, sums[edges].diff() / counts.clamp(min=1), centroids).sort().values
    return centroids


def kmeans_vectors(v: Tensor, k: int, *, max_iter: int = 25, seed: int = 0) -> Tensor:
    """`k` centroids [k, d], float32, of the vectors `v` [m, d]: k-means++ and Lloyd steps, on at most 65,536 of them.

    The start is real D² sampling (Arthur and Vassilvitskii 2007): the next seed is drawn with a probability in proportion
    to the squared distance to the seeds so far. A cluster that lost all its vectors moves to the vector farthest from its
    centroid. Where there are at most `k` distinct vectors these are the centroids. No vectors give zeros. Deterministic for a
    seed.
    """
    points = v.detach().float()[:: max(1, -(-v.shape[0] // SAMPLE))]
    if points.shape[0] == 0:
        return v.new_zeros(k, v.shape[1], dtype=torch.float32)
    distinct = points.unique(dim=0) if len(points) <= 64 * k else points  # sorting vectors is slow
    if len(distinct) <= k:
        return torch.cat([distinct, distinct[-1:].expand(k - len(distinct), -1)])
    centroids, index = _d2_seeds(points, k, torch.Generator().manual_seed(seed)), None
    for _ in range(max_iter):
        nearest = nearest_vector(points, centroids).long()
        if index is not None and torch.equal(nearest, index):
            break
        index = nearest
        counts = torch.bincount(index, minlength=k)[:, None]
        total = torch.zeros_like(centroids).index_add_(0, index, points)
        centroids = torch.where(counts > 0, total / counts.clamp(min=1), centroids)
        for dead in (counts[:, 0] == 0).nonzero()[:, 0].tolist():
            centroids[dead] = points[(points - centroids[index]).square().sum(1).argmax()]
    return centroids


def _d2_seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(len(points), (1,), generator=generator).item()
    seeds = [points[int(first)]]
    distance = (points - seeds[0]).square().sum(1)
    for _ in range(k - 1):
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(points.device)
        reached = distance.double().cumsum(0)
        index = int(torch.searchsorted(reached, draw * reached[-1]).clamp(max=len(points) - 1))
        seeds.append(points[index])
        distance = torch.minimum(distance, (points - seeds[-1]).square().sum(1))
    return torch.stack(seeds)


def nearest_scalar(w: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of the ascending `centroids` [k] for each weight; uint8, in the shape of `w`."""
    middles = ((centroids[1:].double() + centroids[:-1].double()) / 2).to(w.dtype)
    return torch.bucketize(w, middles).to(torch.uint8)


def nearest_vector(v: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of `centroids` [k, d] for each vector [m, d]; uint8 [m]."""
    parts = [
        torch.addmm(centroids.square().sum(1), part, centroids.T, alpha=-2).argmin(1).to(torch.uint8)
        for part in v.split(max(1, CHUNK // len(centroids)))
    ]
    return torch.cat(parts) if parts else v.new_zeros(0, dtype=torch.uint8)
