"""What onnxruntime makes of an exported graph: which layers run on integers, which stay float, and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch

from hf_r2.export.onnx_dress import Form, digest

INTEGER = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger"
)  # fmt: skip
IR_VERSION = 10  # what torch.onnx writes


class KernelError(ValueError):
    """onnxruntime has no kernel for an operator of the graph."""


def report_on(model: ir.Model, forms: Mapping[str, Form], file: str | Path) -> dict[str, Any]:
    """Writes `model` to `file`, loads it in onnxruntime and says what its layers run on; see `to_onnx`.

    Raises KernelError where onnxruntime cannot run it; then nothing is written.
    """
    data = ir.to_proto(model).SerializeToString()
    graph = optimized(data)
    file = Path(file)
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(data)
    beside.replace(file)
    running = _operators_by_codes(graph)
    layers = {name: _said(form, running) for name, form in forms.items()}
    return {
        "size_bytes": len(data),
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "layers": layers,
        "float_layers": {name: entry["why"] for name, entry in layers.items() if entry["why"]},
        "notes": [f"onnxruntime {onnxruntime.__version__}, CPU"],
    }


def optimized(model: bytes) -> onnx.GraphProto:
    """The graph that onnxruntime runs on the CPU after its own changes.

    Raises KernelError where it refuses the model.
    """
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the file is for this CPU only: it is thrown away
        options.optimized_model_filepath = os.fspath(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of their own
            raise KernelError(f"onnxruntime {onnxruntime.__version__} refuses the graph: {error}") from error
        return onnx.load(options.optimized_model_filepath).graph


def runs(opset: int) -> bool:
    """Whether onnxruntime takes graphs of this opset: tried on one that copies its input."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "copy", ends[:1], ends[1:])
    imports = [onnx.helper.make_opsetid("", opset)]
    try:
        optimized(onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString())
    except KernelError:
        return False
    return True


def _operators_by_codes(graph: onnx.GraphProto) -> dict[str, str]:
    """{digest of the codes it reads: integer operator}. By content: layers with equal codes, or tied, share a constant."""
    constants = {i.name: i for i in graph.initializer if len(i.dims) > 1}
    found = {}
    for node in graph.node:
        for name in node.input if node.op_type in INTEGER else ():
            if name in constants:
                codes = torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())
                signed = (codes.int() - 128).to(torch.int8) if codes.dtype == torch.uint8 else codes
                found[digest(signed)] = found[digest(signed.transpose(0, 1))] = node.op_type
    return found


def _said(form: Form, running: Mapping[str, str]) -> dict[str, str]:
    operator = running.get(form.digest, "")
    if form.mode in ("integer", "dynamic"):
        if operator:
            return {"mode": form.mode, "operator": operator, "why": ""}
        why = "onnxruntime has no integer kernel that gives a float output here (a residual sum reads it): pass seams"
        return {"mode": form.mode, "operator": "float", "why": why}
    if form.mode == "float":
        return {"mode": "float", "operator": "float", "why": form.why}
    return {"mode": form.mode, "operator": "MatMulNBits" if form.mode == "blocks" else "Gather", "why": ""}
