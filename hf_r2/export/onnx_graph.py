"""Changes to an exported graph that leave its results as they are, and let onnxruntime see integer operators.

onnxruntime makes QLinearConv of DequantizeLinear - Conv - [Relu] - QuantizeLinear, with nothing in between: a padding, a ReLU6
or a second reader of the output each leave a float convolution behind, which is slower than that of the float model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a value that is an initializer or a Constant; None for what is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value."""
    return [use.node for use in value.uses()]


def nodes_of(graph: ir.Graph, *kinds: str) -> list[ir.Node]:
    """The nodes of these operators, in order."""
    return [node for node in graph if node.op_type in kinds]


def grid_of(quantize: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a QuantizeLinear with one of each; None for others."""
    scale, zero = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    return None if scale is None or zero is None or scale.size > 1 else (float(scale.item()), int(zero.item()))


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new constant in the graph, or the one that is there by this name."""
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        graph.register_initializer(value)
    return graph.initializers[name]


def tidy_(graph: ir.Graph) -> None:
    """Runs all changes, in place."""
    drop_empty_pads_(graph)
    merge_pads_(graph)
    merge_clips_(graph)
    merge_quantizers_(graph)


def strip_(model: ir.Model) -> None:
    """Takes out what no runtime reads: stack traces of the export (a third of a small file), and shapes, which some of the
    changes here made wrong."""
    graph = model.graph
    ends = {*graph.inputs, *graph.outputs}
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            if value not in ends:
                value.shape = value.type = None
            value.metadata_props.clear()


def bypass_(graph: ir.Graph, node: ir.Node) -> None:
    """Lets the readers of a node's first output read its first input, and takes the node out, in place."""
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
    graph.remove(node, safe=True)


def _padding(node: ir.Node) -> list[int] | None:
    """[begin of each axis.., end of each axis..] of a Pad with zeros; None for other padding and unknown sizes."""
    pads, value, axes = (constant(v) for v in [*node.inputs, None, None, None][1:4])
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)  # type: ignore[union-attr]
    mode = node.attributes.get("mode")
    if pads is None or rank is None or (mode is not None and mode.as_string() != "constant"):
        return None
    if value is not None and value.item() != 0:
        return None
    places = range(rank) if axes is None else [int(a) % rank for a in axes]
    full = [0] * (2 * rank)
    for i, axis in enumerate(places):
        full[axis], full[axis + rank] = int(pads[i]), int(pads[i + len(places)])
    return full


def drop_empty_pads_(graph: ir.Graph) -> None:
    """Takes out Pad nodes that add nothing."""
    for node in nodes_of(graph, "Pad"):
        if (pads := _padding(node)) is not None and not any(pads) and not node.outputs[0].is_graph_output():
            bypass_(graph, node)


def merge_pads_(graph: ir.Graph) -> None:
    """Pad - QuantizeLinear - DequantizeLinear - Conv: the convolution pads by itself. Zero is on the grid: nothing changes."""
    for node in nodes_of(graph, "Pad"):
        pads = _padding(node)
        if pads is None or min(pads) < 0 or any(pads[axis] for axis in (0, 1, len(pads) // 2, len(pads) // 2 + 1)):
            continue
        convolutions = [_convolution_behind(reader) for reader in users(node.outputs[0])]
        if not convolutions or None in convolutions:
            continue
        half = len(pads) // 2
        for conv in convolutions:
            assert conv is not None
            own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * (2 * (half - 2))
            more = [*pads[2:half], *pads[half + 2 :]]
            conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, more, strict=True)])
        bypass_(graph, node)


def _convolution_behind(quantize: ir.Node) -> ir.Node | None:
    """The Conv that alone reads this QuantizeLinear's values, by way of a clip of the codes perhaps."""
    node = quantize if quantize.op_type == QUANTIZE else None
    while node is not None and node.op_type in (QUANTIZE, "Clip", DEQUANTIZE):
        readers = users(node.outputs[0])
        node = readers[0] if len(readers) == 1 and readers[0].inputs[0] is node.outputs[0] else None
    return node if node is not None and node.op_type == "Conv" else None


def merge_clips_(graph: ir.Graph) -> None:
    """Clip - QuantizeLinear: codes are clipped instead of values, where the end of the grid does not do it already.

    Rounding is monotone: the code of a clipped value is the clipped code.
    """
    for node in nodes_of(graph, "Clip"):
        low, high = (constant(v) for v in [*node.inputs, None, None][1:3])
        readers = users(node.outputs[0])
        if low is None or high is None or low.dtype != np.float32 or not readers:
            continue
        if node.outputs[0].is_graph_output() or any(r.op_type != QUANTIZE or grid_of(r) is None for r in readers):
            continue
        for reader in readers:
            scale, zero = grid_of(reader)  # type: ignore[misc]
            ends = [int(np.clip(np.rint(end / np.float32(scale)) + zero, 0, 255)) for end in (low, high)]
            if ends != [0, 255]:
                _clip_codes_(graph, reader, ends)
        bypass_(graph, node)


def _clip_codes_(graph: ir.Graph, quantize: ir.Node, ends: list[int]) -> None:
    names = [initializer(graph, f"code_{end}", np.array(end, dtype=np.uint8)) for end in ends]
    codes = quantize.outputs[0]
    clip = ir.node("Clip", [codes, *names], name=f"{codes.name}_clip")
    clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].dtype = (
        f"{codes.name}_clipped",
        codes.shape,
        ir.DataType.UINT8,
    )
    for use in list(codes.uses()):
        use.node.replace_input_with(use.idx, clip.outputs[0])
    clip.replace_input_with(0, codes)
    graph.insert_after(quantize, clip)


def merge_quantizers_(graph: ir.Graph) -> None:
    """One QuantizeLinear (and what follows: a clip of codes, DequantizeLinear) where several do the same to one value."""
    seen: dict[Any, ir.Node] = {}
    for node in list(graph):
        if node.op_type not in (QUANTIZE, DEQUANTIZE) and not (node.op_type == "Clip" and _clips_codes(node)):
            continue
        parts = [constant(v) for v in node.inputs[1:]]
        if (
            any(p is None or p.size > 1 for p in parts)
            or node.inputs[0] is None
            or constant(node.inputs[0]) is not None
        ):
            continue
        key = (node.op_type, node.inputs[0], *[(str(p.dtype), p.item()) for p in parts if p is not None])
        if key in seen:
            ir.convenience.replace_all_uses_with(node.outputs[0], seen[key].outputs[0])
            graph.remove(node, safe=True)
        else:
            seen[key] = node


def _clips_codes(node: ir.Node) -> bool:
    low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return low is not None and low.dtype == np.uint8
