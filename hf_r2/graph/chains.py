"""Chains of layers without a branch between them, batch norms that fold, and residual joins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from hf_r2.graph.trace import Graph
from hf_r2.layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED

aten = torch.ops.aten
RELUS = {aten.relu.default, aten.relu_.default}
CLIPS = {aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.relu6_.default}
SAME = {  # operations that leave every channel as it is, in eval mode
    *(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.dropout.default),
    *(aten.dropout_.default, aten.detach_.default, aten.feature_dropout.default),
}
SPATIAL = {  # operations within a channel that commute with a positive factor on it
    *(aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default),
}
PADS = {aten.constant_pad_nd.default, aten.pad.default}
FLATTEN = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims, aten.squeeze.dim}
JOINS = {aten.add.Tensor, aten.add_.Tensor}


@dataclass(frozen=True)
class Pair:
    """`first` feeds `second` and nothing else, through `activation` ("relu", "relu6" or None) and what commutes with scaling.

    `activation_module`: the name of the activation's module where it has one of its own. `padded`: zeros are put around
    what `first` gives before `second` reads it.
    """

    first: str
    second: str
    activation: str | None = None
    activation_module: str | None = None
    padded: bool = False


@dataclass(frozen=True)
class Join:
    """A residual sum: the module it is in, and the layers whose outputs meet there (None for what is no layer's)."""

    module: str
    layers: tuple[str | None, ...]


def batch_norm_folds(graph: Graph, model: nn.Module) -> dict[str, str]:
    """{convolution: the batch norm that alone reads its output}, both called once, in the order of the computation."""
    folds = {}
    for name, nodes in graph.layers.items():
        after = _only_user(nodes[0]) if len(nodes) == 1 else None
        if after is None or after.target is not aten.batch_norm.default:
            continue
        conv, norm_name = model.get_submodule(name), graph.module_of[after]
        norm = model.get_submodule(norm_name)
        calls = sum(graph.module_of[node] == norm_name for node in graph.nodes)
        exact = type(norm) in BATCH_NORMS and norm.track_running_stats and calls == 1  # subclasses may do more
        grouped = (
            isinstance(conv, TRANSPOSED) and conv.groups > 1
        )  # their output channels are not one axis of the weight
        if exact and isinstance(conv, (*CONVOLUTIONS, *TRANSPOSED)) and not grouped:
            folds[name] = norm_name
    return folds


def chains(graph: Graph, model: nn.Module) -> list[Pair]:
    """Pairs of layers called once each, the second the only reader of the first, in the order of the computation.

    They are those of the model with its batch norms folded: one that folds stands in nobody's way.
    """
    pairs, norms = [], set(batch_norm_folds(graph, model).values())
    for name, nodes in graph.layers.items():
        if len(nodes) == 1 and nodes[0].target is not aten.embedding.default:
            pair = _follow(graph, model, name, nodes[0], norms)
            if pair is not None:
                pairs.append(pair)
    return pairs


def _follow(graph: Graph, model: nn.Module, name: str, node: Node, norms: set[str]) -> Pair | None:
    kind = module = None
    padded = False
    while (following := _only_user(node)) is not None:
        target = following.target
        second = graph.layer_at(following)
        if second is not None:
            once = len(graph.layers[second]) == 1 and following.args[0] is node
            own = getattr(model.get_submodule(second), "padding", 0)
            padded |= isinstance(own, (tuple, str)) and own != "valid" and any(p != 0 for p in own)
            return Pair(name, second, kind, module, padded) if once else None
        if target in RELUS or target in CLIPS:
            if kind is not None:
                return None
            kind = "relu" if target in RELUS else _clip_kind(following)
            module = _own_module(graph, model, following)
            if kind is None:
                return None
        elif not (target in SAME or graph.module_of[following] in norms or _keeps_channels(following)):
            return None
        padded |= target in PADS and any(p != 0 for p in following.args[1])  # type: ignore[union-attr]
        node = following
    return None


def _clip_kind(node: Node) -> str | None:
    low, high = (*node.args[1:], None, None)[:2]
    if node.target in (aten.relu6.default, aten.relu6_.default):
        return "relu6"
    return "relu6" if (low, high) == (0.0, 6.0) else None


def _keeps_channels(node: Node) -> bool:
    if node.target in PADS:
        return _pads_with_zeros(node)
    return node.target in SPATIAL or is_spatial_mean(node) or is_flattening(node)


def is_spatial_mean(node: Node) -> bool:
    """Whether a node is the mean over the space of images [N, C, H, W]."""
    source = node.args[0] if node.args else None
    if node.target is not aten.mean.dim or not isinstance(source, Node):
        return False
    return source.meta["val"].dim() == 4 and sorted(d % 4 for d in node.args[1]) == [2, 3]  # type: ignore[operator,union-attr,arg-type]


def is_flattening(node: Node) -> bool:
    """Whether a node only drops the space of images of one pixel: [N, C, 1, 1] to [N, C]."""
    source = node.args[0] if node.args else None
    if node.target not in FLATTEN or not isinstance(source, Node):
        return False
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) == 4 and len(after) == 2 and before[2:].numel() == 1 and after[1] == before[1]


def _pads_with_zeros(node: Node) -> bool:
    rest = list(node.args[2:])
    mode = rest[0] if rest and isinstance(rest[0], str) else "constant"
    value = next((a for a in rest if isinstance(a, (int, float)) and not isinstance(a, bool)), 0)
    pads: list[int] = node.args[1]  # type: ignore[assignment]
    return mode == "constant" and value == 0 and len(pads) <= 4


def _own_module(graph: Graph, model: nn.Module, node: Node) -> str | None:
    """The activation's module, if that is nothing but this activation and runs nowhere else."""
    name = graph.module_of[node]
    alone = isinstance(model.get_submodule(name), (nn.ReLU, nn.ReLU6, nn.Hardtanh))
    return name if alone and sum(n == name for n in graph.module_of.values()) == 1 else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def following_activation(graph: Graph, model: nn.Module, layer: str) -> str | None:
    """Name of the module of the ReLU or ReLU6 that alone reads what `layer` gives, batch norm folded; else None."""
    nodes = graph.layers.get(layer, [])
    norms = set(batch_norm_folds(graph, model).values())
    node = _only_user(nodes[0]) if len(nodes) == 1 else None
    while node is not None and (node.target in SAME or graph.module_of[node] in norms):
        node = _only_user(node)
    if node is None or not (node.target in RELUS or (node.target in CLIPS and _clip_kind(node))):
        return None
    return _own_module(graph, model, node)


def joins(graph: Graph) -> list[Join]:
    """Sums of two results of the forward pass, where residual branches meet, in the order of the computation."""
    found, above = [], {path for nodes in graph.layers.values() for path in graph.path_of(nodes[0])}
    for node in graph.nodes:
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        inside = graph.module_of[node] in above  # not in an activation function that happens to hold a sum
        if inside and node.target in JOINS and len(operands) == 2 and all(_after_a_layer(graph, a) for a in operands):
            found.append(Join(graph.module_of[node], tuple(_source(graph, a) for a in operands)))
    return found


def _after_a_layer(graph: Graph, node: Node) -> bool:
    return node in graph.inputs and node.op == "call_function" and node.meta["val"].is_floating_point()


def _source(graph: Graph, node: Node) -> str | None:
    """The layer whose result this is, but for batch norm, activation and what leaves channels alone."""
    while graph.layer_at(node) is None:
        passes = node.target in SAME or node.target in RELUS or node.target in CLIPS
        if not (passes or node.target is aten.batch_norm.default) or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return graph.layer_at(node)
