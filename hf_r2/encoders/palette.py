"""Rounding to a fixed palette: any levels, stored once, with a scale for the tensor or for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_r2.encoders.base import Encoded, straight_through
from hf_r2.encoders.kmeans import nearest_scalar


class Palette(nn.Module):
    """Nearest of the palette's levels times the scale; the identity's gradient.

    Buffers `centroids` [2**bits, 1], float32, ascending, and `scale`, float32, broadcastable to the weight.
    """

    centroids: Tensor
    scale: Tensor

    def __init__(self, centroids: Tensor, scale: Tensor):
        super().__init__()
        self.bits = len(centroids).bit_length() - 1
        self.register_buffer("centroids", centroids.reshape(-1, 1).float())
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))

    def encode(self, w: Tensor) -> Encoded:
        """Codes of the nearest level, and what decodes them."""
        codes = nearest_scalar(w.detach().float() / self.scale, self.centroids[:, 0])
        return Encoded(codes, self.bits, self.scale, centroids=self.centroids)

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight, in the dtype of `w`."""
        with torch.no_grad():
            value = self.encode(w).decode()
        return straight_through(w, value)
