"""Grids for the sums and layer outputs that no input quantizer covers, so that residual networks stay integer throughout.

Our models quantize the inputs of layers. The output of a layer that goes into a residual sum, and the sum that goes into the
next, are float: onnxruntime then has to run that convolution in float. This puts QuantizeLinear on them too; the range is read
off the batches that the caller gives. It changes the model a little: it is asked for, never done unasked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hf_r2.export.onnx_graph import DEQUANTIZE, QUANTIZE, grid_of, initializer, nodes_of, users
from hf_r2.grid import Grid, scale_and_zero_point

ACTIVATIONS, POOLS = ("Relu", "Clip"), ("MaxPool",)


def quantize_seams_(model: ir.Model, batches: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """Quantizes those values to 8 bits, in place; returns their names. Ranges: that of the inputs where a layer input reads the
    same value, else the lowest and highest value in `batches`."""
    graph = model.graph
    seams = [value for node in nodes_of(graph, "Conv", "Add") if (value := _seam(node)) is not None]
    seams = _in_reach(seams)
    unknown = [value for value in seams if _known(value) is None]
    ranges = _observed(model, unknown, batches) if unknown else {}
    for value in seams:
        grid = _known(value) or _grid(graph, value, *ranges[str(value.name)])
        back = _route_through_(graph, value, grid)
        for pool in [reader for reader in users(back) if reader.op_type in POOLS]:
            _route_through_(graph, pool.outputs[0], grid)  # maxima lie on the grid of what they are taken of
    return [str(value.name) for value in seams]


def _seam(node: ir.Node) -> ir.Value | None:
    """The value that a node and the ReLU behind it give, if another thing than one QuantizeLinear reads it."""
    value = node.outputs[0]
    readers = users(value)
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS:
        value = readers[0].outputs[0]
        readers = users(value)
    done = len(readers) == 1 and readers[0].op_type == QUANTIZE
    return None if done or value.is_graph_output() or not readers else value


def _source(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, before its activation."""
    node = None if value is None else value.producer()
    return node.inputs[0].producer() if node is not None and node.op_type in ACTIVATIONS else node  # type: ignore[union-attr]


def _in_reach(seams: list[ir.Value]) -> list[ir.Value]:
    """Those whose node can compute on integers: convolutions of quantized inputs, and sums of two values on grids."""
    kept: list[ir.Value] = []
    for value in seams:  # in the order of the graph: a sum comes after what it adds
        node = _source(value)
        assert node is not None
        if node.op_type == "Conv":
            ready = all(_is_on_grid(v, []) for v in node.inputs[:2])
        else:
            ready = all(_is_on_grid(v, kept) for v in node.inputs)
        if ready:
            kept.append(value)
    return kept


def _is_on_grid(value: ir.Value | None, kept: list[ir.Value]) -> bool:
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type in POOLS:
        return _is_on_grid(node.inputs[0], kept)
    return node.op_type == DEQUANTIZE or any(value is k for k in kept)


def _known(value: ir.Value) -> list[ir.Value] | None:
    """Scale and zero point of a layer's 8-bit input that is this value, or its maxima."""
    for reader in users(value):
        clipped = any(r.op_type == "Clip" for r in users(reader.outputs[0]))  # fewer bits than a sum needs
        if reader.op_type == QUANTIZE and grid_of(reader) is not None and not clipped:
            return list(reader.inputs[1:])  # type: ignore[arg-type]
        if reader.op_type in POOLS and (found := _known(reader.outputs[0])) is not None:
            return found
    return None


def _observed(
    model: ir.Model, values: list[ir.Value], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest of each value over the batches."""
    import onnxruntime

    probe = ir.from_proto(ir.to_proto(model))
    named = {str(v.name): v for node in probe.graph for v in node.outputs}
    wanted = [str(v.name) for v in values]
    for name in wanted:
        for kind in ("ReduceMin", "ReduceMax"):
            node = ir.node(kind, [named[name]], {"keepdims": 0}, name=f"{name}_{kind}")
            node.outputs[0].name, node.outputs[0].dtype = f"{name}_{kind}", ir.DataType.FLOAT
            node.outputs[0].shape = ir.Shape([])
            probe.graph.append(node)
            probe.graph.outputs.append(node.outputs[0])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(probe).SerializeToString(), options, ["CPUExecutionProvider"])
    taken = [i.name for i in session.get_inputs()]
    outputs = [f"{name}_{kind}" for name in wanted for kind in ("ReduceMin", "ReduceMax")]
    found: list[Any] = [
        session.run(outputs, {name: batch[name].detach().cpu().numpy() for name in taken}) for batch in batches
    ]
    ends = np.array(found, dtype=np.float32).reshape(len(found), len(wanted), 2)
    return {name: (float(ends[:, i, 0].min()), float(ends[:, i, 1].max())) for i, name in enumerate(wanted)}


def _grid(graph: ir.Graph, value: ir.Value, low: float, high: float) -> list[ir.Value]:
    scale, zero = scale_and_zero_point(torch.tensor(low), torch.tensor(high), Grid(8, symmetric=False))
    return [
        initializer(graph, f"{value.name}_scale", np.array(float(scale), dtype=np.float32)),
        initializer(graph, f"{value.name}_zero_point", np.array(int(zero), dtype=np.uint8)),
    ]


def _route_through_(graph: ir.Graph, value: ir.Value, grid: list[ir.Value]) -> ir.Value:
    """Lets everything that reads `value` read it from this grid, in place; layer inputs on the same grid read its codes.

    Returns the value on the grid.
    """
    readers = list(value.uses())
    codes, back = ir.node(QUANTIZE, [value, *grid]), ir.node(DEQUANTIZE, [None, *grid])
    for node, ending, dtype in ((codes, "codes", ir.DataType.UINT8), (back, "on_grid", ir.DataType.FLOAT)):
        node.name = node.outputs[0].name = f"{value.name}_{ending}"
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, dtype
    back.replace_input_with(0, codes.outputs[0])
    graph.insert_after(value.producer(), [codes, back])  # type: ignore[arg-type]
    for use in readers:
        if use.node.op_type == QUANTIZE and list(use.node.inputs[1:]) == grid:
            ir.convenience.replace_all_uses_with(use.node.outputs[0], codes.outputs[0])
            graph.remove(use.node, safe=True)
        else:
            use.node.replace_input_with(use.idx, back.outputs[0])
    return back.outputs[0]
