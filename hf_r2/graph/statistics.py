"""What goes into each layer on average, from batch-norm statistics alone (DFQ, arXiv:1906.04721, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from hf_r2.graph.chains import CLIPS, JOINS, PADS, RELUS, SAME, is_flattening, is_spatial_mean
from hf_r2.graph.equalize import ClippedReLU
from hf_r2.graph.fold import statistics_of
from hf_r2.graph.trace import Graph

aten = torch.ops.aten
REACH = 6.0  # standard deviations that a range covers
AVERAGES = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default}


@dataclass(frozen=True)
class Statistics:
    """Mean, variance, and the range that values are taken to lie in, for each channel [C]."""

    mean: Tensor
    var: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def normal(cls, mean: Tensor, std: Tensor) -> Statistics:
        """Of a normal distribution: the range reaches 6 standard deviations to both sides."""
        return cls(mean, std.square(), mean - REACH * std, mean + REACH * std)

    def clipped(self, low: float, high: Tensor | float) -> Statistics:
        """Of max(low, min(high, x)), x taken as normal."""
        top = torch.as_tensor(high, dtype=self.mean.dtype, device=self.mean.device).expand_as(self.mean)
        mean, var = clipped_normal(self.mean, self.var.sqrt(), torch.full_like(top, low), top)
        return Statistics(mean, var, self.low.clamp(min=low), torch.minimum(self.high, top).clamp(min=low))

    def plus(self, other: Statistics) -> Statistics:
        """Of a sum of independent values."""
        return Statistics(self.mean + other.mean, self.var + other.var, self.low + other.low, self.high + other.high)


def clipped_normal(mean: Tensor, std: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a normal variable clipped to [low, high]; `high` may be infinite (a ReLU's rectified normal).

    E[y] = low Phi(a) + high (1 - Phi(b)) + mean (Phi(b) - Phi(a)) + std (phi(a) - phi(b)), a and b the ends in standard units.
    """
    mean, std, low, high = (t.double() for t in (mean, std.clamp(min=1e-12), low, high))
    top = torch.where(torch.isfinite(high), high, mean.abs() + 100 * std + low.abs())
    a, b = (low - mean) / std, (top - mean) / std
    phi_a, phi_b = ((-t.square() / 2).exp() / (2 * torch.pi) ** 0.5 for t in (a, b))
    cdf_a, cdf_b = torch.special.ndtr(a), torch.special.ndtr(b)
    inside, above = cdf_b - cdf_a, torch.special.ndtr(-b)
    first = low * cdf_a + top * above + mean * inside + std * (phi_a - phi_b)
    second = low.square() * cdf_a + top.square() * above + (mean.square() + std.square()) * inside
    second = second + std * ((mean + low) * phi_a - (mean + top) * phi_b)
    return first.float(), (second - first.square()).clamp(min=0).float()


def input_statistics(graph: Graph, model: nn.Module) -> dict[str, Statistics]:
    """{layer: statistics of its input}, as far as folded batch norms tell, through activations, sums and averages."""
    known: dict[Node, Statistics | None] = {}
    found = {}
    for node in graph.nodes:
        layer = graph.layer_at(node)
        if layer is not None and len(graph.layers[layer]) == 1:
            source = node.args[0]
            statistics = known.get(source) if isinstance(source, Node) else None
            if statistics is not None:
                found[layer] = statistics
        known[node] = _of_node(graph, model, node, known)
    return found


def _of_node(graph: Graph, model: nn.Module, node: Node, known: dict[Node, Statistics | None]) -> Statistics | None:
    layer = graph.layer_at(node)
    if layer is not None:
        norm = statistics_of(model.get_submodule(layer))
        return None if norm is None else Statistics.normal(norm.mean, norm.std)  # type: ignore[arg-type]
    sources = [known.get(a) for a in node.args if isinstance(a, Node)]
    before = sources[0] if sources else None
    if before is None:
        return None
    clip = model.get_submodule(graph.module_of[node])
    if isinstance(clip, ClippedReLU):  # its last operation is what counts; the clamp before it changes nothing again
        return before if node.target is aten.clamp.default else before.clipped(0.0, clip.bound)
    if node.target in RELUS:
        return before.clipped(0.0, float("inf"))
    if node.target in CLIPS:
        return before.clipped(0.0, 6.0) if _is_relu6(node) else None
    if node.target in JOINS and len(sources) == 2 and sources[1] is not None:
        return before.plus(sources[1]) if before.mean.shape == sources[1].mean.shape else None
    same = node.target in SAME or node.target in PADS or node.target in AVERAGES or is_spatial_mean(node)
    return before if same or is_flattening(node) else None


def _is_relu6(node: Node) -> bool:
    return node.target in (aten.relu6.default, aten.relu6_.default) or tuple(node.args[1:3]) == (0.0, 6.0)
