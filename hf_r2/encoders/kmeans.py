"""k-means of scalars: sorted once, so that a Lloyd step costs k binary searches whatever the number of weights."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans_scalar(w: Tensor, k: int, *, restarts: int = 4, max_iter: int = 100, seed: int = 0) -> Tensor:
    """`k` centroids [k], ascending, float32, of the values of `w` (any shape); the best of several starts.

    Starts: equal-mass quantiles, and `restarts` draws by real D² sampling (k-means++, Arthur and Vassilvitskii 2007).
    Where `w` holds at most `k` distinct values these are the centroids, and the clustering is exact. Empty weights give
    zeros. Deterministic for a seed.
    """
    values = w.detach().flatten().double().sort().values
    if values.numel() == 0:
        return torch.zeros(k, device=w.device)
    distinct = values.unique_consecutive()
    if distinct.numel() <= k:
        return torch.cat([distinct, distinct[-1:].expand(k - distinct.numel())]).float()
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    squares = torch.cat([values.new_zeros(1), values.square().cumsum(0)])
    place = (torch.arange(k, device=w.device, dtype=torch.float64) + 0.5) / k * values.numel() - 0.5
    quantiles = (values[place.floor().long()] + values[place.ceil().long()]) / 2
    generator = torch.Generator().manual_seed(seed)
    starts = [quantiles] + [_d2_sample(values, k, generator) for _ in range(restarts)]
    results = [_lloyd(values, sums, squares, start, max_iter) for start in starts]
    return min(results, key=lambda r: r[1])[0].float()


def _d2_sample(values: Tensor, k: int, generator: torch.Generator, most: int = 65536) -> Tensor:
    """k-means++ seeds of sorted values, drawn from at most `most` evenly spaced ones."""
    sample = values[:: max(1, values.numel() // most)].cpu()
    seeds = [sample[torch.randint(sample.numel(), (1,), generator=generator)]]
    distance = (sample - seeds[0]).square()
    for _ in range(k - 1):
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * distance.sum()
        index = torch.searchsorted(distance.cumsum(0), draw).clamp(max=sample.numel() - 1)
        seeds.append(sample[index])
        distance = torch.minimum(distance, (sample - seeds[-1]).square())
    return torch.cat(seeds).sort().values.to(values.device)


def _lloyd(values: Tensor, sums: Tensor, squares: Tensor, start: Tensor, max_iter: int) -> tuple[Tensor, float]:
    """Lloyd steps over sorted values with prefix sums, until nothing moves: centroids and squared error.

    A cluster that lost all its weights stays where it is: it can win some back later.
    """
    centroids, bounds = start, None
    for _ in range(max_iter):
        inner = torch.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), values.numel())])
        if bounds is not None and torch.equal(edges, bounds):
            break
        bounds = edges
        counts = edges.diff()
        means = sums[edges].diff() / counts.clamp(min=1)
        centroids = torch.where(counts > 0, means, centroids).sort().values
    assert bounds is not None  # max_iter is at least 1
    counts, first, second = bounds.diff(), sums[bounds].diff(), squares[bounds].diff()
    error = (second - 2 * centroids * first + counts * centroids.square()).sum()
    return centroids, float(error)


def nearest_scalar(w: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of the ascending `centroids` [k] for each weight; uint8, in the shape of `w`."""
    middles = ((centroids[1:].double() + centroids[:-1].double()) / 2).to(w.dtype)
    return torch.bucketize(w, middles).to(torch.uint8)
