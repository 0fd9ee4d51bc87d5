"""Slow folding: one element after the other."""

import math

import torch


def folded_slowly(left, right, kernel, shape):
    """The weight [d0, d1, ...] that the factors left [m, r], right [r, n] stand for, with the kernel on this side."""
    d0, d1, size = shape[0], shape[1], math.prod(shape[2:])
    result = torch.zeros(d0, d1, size, dtype=left.dtype)
    for o in range(d0):
        for i in range(d1):
            for k in range(size):
                row, column = (o, i * size + k) if kernel == "right" else (o * size + k, i)
                result[o, i, k] = sum(left[row, r] * right[r, column] for r in range(left.shape[1]))
    return result.reshape(shape)
