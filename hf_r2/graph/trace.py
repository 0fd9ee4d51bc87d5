"""The operations of one forward pass, in order, with the names of the modules they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from hf_r2.batches import evaluating, inputs_for
from hf_r2.layers import is_weight_layer

WITHOUT_GRAPH = "nearest, mse, percentile, requant and squant with options={'fold': False} need no graph"
FALLBACK_SIZE = 64  # pixels of an example image where the config names none


@dataclass
class Graph:
    """Operations of a forward pass (fx nodes with a tensor result, in order) and the module each belongs to.

    `module_of`: the innermost module's name, by node; `layers`: the nodes of each weight layer by its name; `inputs`: the
    nodes that depend on what the user passed in.
    """

    nodes: list[Node]
    module_of: dict[Node, str]
    layers: dict[str, list[Node]] = field(default_factory=dict)
    inputs: set[Node] = field(default_factory=set)

    def path_of(self, node: Node) -> list[str]:
        """Names of the modules around an operation, outermost first."""
        return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]

    def layer_at(self, node: Node) -> str | None:
        """The weight layer whose operation this node is, or None."""
        name = self.module_of.get(node, "")
        return name if node in self.layers.get(name, ()) else None


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Inputs that a transformers model can be traced with, made from its config: images of zeros, a few tokens.

    Raises ValueError for other models: they need batches.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is not None and main == "pixel_values":
        size = getattr(config, "image_size", None) or FALLBACK_SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    if config is not None and main == "input_ids":
        inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.ones(2, 8, dtype=torch.long)
        return inputs
    raise ValueError(
        f"{type(model).__name__} is no transformers model with a known input: pass batches, the graph is read with the first"
    )


def read_graph(model: nn.Module, inputs: Mapping[str, Any]) -> Graph:
    """The graph of `model(**inputs)` in eval mode; the model is not changed.

    Raises ValueError that names the module in which torch.export failed, and what works without a graph.
    """
    inputs = inputs_for(model, inputs)
    with evaluating(model), _module_stack(model) as stack:
        try:
            exported = torch.export.export(model, (), inputs, strict=False)
        except Exception as error:
            where = f"module {stack[-1]!r}" if stack else "the model"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"torch.export cannot read the graph of {type(model).__name__}: it fails in {where} ({reason}); "
                f"{WITHOUT_GRAPH}"
            ) from error
    return _graph(model, exported)


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules being run, innermost last; after an exception, where it happened."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, n=name: stack.append(n), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: (stack.pop(), None)[1]))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _graph(model: nn.Module, exported: torch.export.ExportedProgram) -> Graph:
    signature = exported.graph_signature
    users = set(signature.user_inputs)
    modules = dict(model.named_modules())
    graph = Graph([], {})
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in users:
            graph.inputs.add(node)
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        graph.nodes.append(node)
        path = [p for p, _ in node.meta.get("nn_module_stack", {}).values()]
        name = path[-1] if path else ""
        graph.module_of[node] = name
        if any(argument in graph.inputs for argument in node.all_input_nodes):
            graph.inputs.add(node)
        if name in modules and is_weight_layer(modules[name]) and reads_weight(node, signature, name):
            graph.layers.setdefault(name, []).append(node)
    return graph


def reads_weight(node: Node, signature: Any, name: str) -> bool:
    """Whether an operation of layer `name` takes the layer's weight (and not only its bias): matmul, convolution, lookup."""
    held = {signature.inputs_to_parameters.get(n.name) for n in node.all_input_nodes}
    return node.target in WEIGHT_OPS and any(key for key in held)


WEIGHT_OPS = {
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.embedding.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.padding,
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
}
