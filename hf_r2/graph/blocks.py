"""Blocks: parts of a model that one value goes into and one value comes out of, found by who reads what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import Node

from hf_r2.graph.trace import Graph
from hf_r2.layers import CONVOLUTIONS, is_table


@dataclass(frozen=True)
class Block:
    """Modules that run one after the other, the output of each the input of the next, and the weight layers in them.

    `read_until`: the number of the last block (its own number is the least) after which nothing reads the block's output.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    read_until: int = 0

    @property
    def name(self) -> str:
        """What it is called in progress bars and logs."""
        return " + ".join(self.names) or "(the whole model)"


def find_blocks(graph: Graph, model: nn.Module) -> list[Block]:
    """The blocks of a model in the order of the computation; together they hold every layer that was called.

    A module is split into its children where these form a chain: one value comes out of each, and none passes by. What
    all layers of a stack read (an encoder's output in a decoder) does not count as passing by. A module with a single
    weight layer is not split further, nor one that has siblings of its class with a residual connection. A depthwise
    convolution joins the block of the layer that follows.
    """
    reading = _Reading(graph, model)
    names = _split("", reading)
    blocks = [Block((name,), tuple(reading.inside(name))) for name in names]
    blocks = _join_depthwise(blocks, reading)
    starts = [reading.span(block.names[0])[0] for block in blocks]
    done = []
    for number, block in enumerate(blocks):
        users = [user for value in reading.exits(block.names[-1]) for user in value.users]
        last = max((reading.order[user] for user in users if user in reading.order), default=-1)
        done.append(replace(block, read_until=max(number, sum(start <= last for start in starts) - 1)))
    return done


class _Reading:
    """Which module produced what, and who reads it; only values that depend on some weight count."""

    def __init__(self, graph: Graph, model: nn.Module):
        self.graph, self.model = graph, model
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.paths = {node: [p for p in graph.path_of(node) if p] for node in graph.nodes}
        weighted = {node for nodes in graph.layers.values() for node in nodes}
        for node in graph.nodes:
            if any(argument in weighted for argument in node.all_input_nodes):
                weighted.add(node)
        self.values = [node for node in graph.nodes if node in weighted]
        self.layers = sorted(graph.layers, key=lambda name: self.order[graph.layers[name][0]])

    def holds(self, name: str, node: Node) -> bool:
        return not name or name in self.paths.get(node, ())

    def span(self, name: str) -> tuple[int, int]:
        inside = [number for node, number in self.order.items() if self.holds(name, node)]
        return inside[0], inside[-1]

    def inside(self, name: str) -> list[str]:
        return [layer for layer in self.layers if not name or layer == name or layer.startswith(f"{name}.")]

    def exits(self, name: str) -> list[Node]:
        return [v for v in self.values if self.holds(name, v) and any(not self.holds(name, user) for user in v.users)]

    def readers(self, value: Node, names: Iterable[str]) -> list[str]:
        return [n for n in names if not self.holds(n, value) and any(self.holds(n, user) for user in value.users)]

    def children(self, name: str) -> list[str]:
        """The modules below `name` that hold layers, lists taken apart, in the order of the computation."""
        found = []
        for child, module in self.model.get_submodule(name).named_children():
            path = f"{name}.{child}".lstrip(".")
            if not self.inside(path):
                continue
            runs = any(self.holds(path, node) for node in self.graph.nodes)
            found += [path] if runs and not isinstance(module, nn.ModuleList) else self.children(path)
        return sorted(found, key=lambda path: self.span(path)[0])

    def siblings(self, name: str, others: list[str]) -> list[str]:
        kind, parent = type(self.model.get_submodule(name)), name.rpartition(".")[0]
        return [o for o in others if type(self.model.get_submodule(o)) is kind and o.rpartition(".")[0] == parent]

    def is_closed(self, name: str, others: list[str]) -> bool:
        """One value comes out of `name`, and no other that came before it is read after it."""
        first, last = self.span(name)
        if sum(self.holds(name, node) for node in self.graph.nodes) != last - first + 1:
            return False  # it runs in several pieces
        families = [self.siblings(other, others) for other in others]
        common = {v for v in self.values if any(len(self.readers(v, family)) > 1 for family in families)}
        passing = [
            v for v in self.values
            if self.order[v] < first and v not in common and any(self.order.get(u, -1) > last for u in v.users)
        ]  # fmt: skip
        return len([v for v in self.exits(name) if v not in common]) == 1 and not passing


def _split(name: str, reading: _Reading) -> list[str]:
    children = reading.children(name)
    covered = [layer for child in children for layer in reading.inside(child)]
    if len(reading.inside(name)) <= 1 or sorted(covered) != sorted(reading.inside(name)):
        return [name]
    if not all(reading.is_closed(child, children) for child in children):
        return [name] if name else _split_open(children, reading)
    parts = {child: _split(child, reading) for child in children}
    whole = {child for child, split in parts.items() if split == [child] and len(reading.inside(child)) > 1}
    for child in children:
        if whole & set(reading.siblings(child, children)):
            parts[child] = [child]
    return [part for child in children for part in parts[child]]


def _split_open(children: list[str], reading: _Reading) -> list[str]:
    """The top of a model whose parts do not form a chain (tied embeddings read twice): each part for itself."""
    return [part for child in children for part in _split(child, reading)]


def _join_depthwise(blocks: list[Block], reading: _Reading) -> list[Block]:
    joined: list[Block] = []
    for block in blocks:
        before = joined[-1] if joined else None
        if before is not None and _is_depthwise(before, reading) and _feeds(before, block, reading):
            joined[-1] = Block(before.names + block.names, before.layers + block.layers)
        else:
            joined.append(block)
    return joined


def _is_depthwise(block: Block, reading: _Reading) -> bool:
    layer = reading.model.get_submodule(block.layers[-1])
    single = len(block.layers) == 1 and isinstance(layer, CONVOLUTIONS)
    return single and layer.groups == layer.in_channels > 1  # type: ignore[union-attr]


def _feeds(one: Block, other: Block, reading: _Reading) -> bool:
    """Whether all that `other` reads is what `one` gives."""
    read = [v for v in reading.values if reading.readers(v, other.names[:1])]
    return read == reading.exits(one.names[-1])


def holds_only_tables(block: Block, model: nn.Module) -> bool:
    """True for blocks of embeddings: no rounding there is better than the nearest."""
    return all(is_table(model.get_submodule(name)) for name in block.layers)
