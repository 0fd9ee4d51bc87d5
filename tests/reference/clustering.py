"""Slow clustering: dense attention, every iteration left to autograd; optimal scalar k-means by trying every cut."""

from itertools import combinations, pairwise

import torch


def unrolled(w, centroids, tau, iterations):
    """Soft-clustered weights and centroids after so many unrolled DKM iterations (ALGORITHMS 2.1, squared distance)."""
    for _ in range(iterations):
        attention = torch.softmax(-(w[:, None] - centroids).square().sum(-1) / tau, dim=1)
        centroids = attention.T @ w / attention.sum(0)[:, None]
    attention = torch.softmax(-(w[:, None] - centroids).square().sum(-1) / tau, dim=1)
    return attention @ centroids, centroids


def optimal_kmeans_error(values, k):
    """Least squared error of k clusters of these few scalars."""
    values = sorted(values)
    best = float("inf")
    for cuts in combinations(range(1, len(values)), k - 1):
        edges = [0, *cuts, len(values)]
        parts = [values[a:b] for a, b in pairwise(edges)]
        best = min(best, sum((v - sum(p) / len(p)) ** 2 for p in parts for v in p))
    return best
