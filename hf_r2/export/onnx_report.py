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

from hf_r2.export.onnx_dress import Form
from hf_r2.export.onnx_graph import CODES

INTEGER = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger"
)  # fmt: skip


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
    running = _operators_by_layer(graph)
    layers = {name: _said(name, form, running) for name, form in forms.items()}
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


def _operators_by_layer(graph: onnx.GraphProto) -> dict[str, str]:
    """{layer: the operator that reads its codes}."""
    return {
        name.removesuffix(CODES): node.op_type for node in graph.node for name in node.input if name.endswith(CODES)
    }


def _said(name: str, form: Form, running: Mapping[str, str]) -> dict[str, str]:
    operator = running.get(name, "")
    if form.mode in ("integer", "dynamic"):
        if operator in INTEGER:
            return {"mode": form.mode, "operator": operator, "why": ""}
        why = "onnxruntime has no integer kernel that gives a float output here (a residual sum reads it): pass seams"
        return {"mode": form.mode, "operator": "float", "why": why}
    if form.mode == "float":
        return {"mode": "float", "operator": "float", "why": form.why}
    return {"mode": form.mode, "operator": "MatMulNBits" if form.mode == "blocks" else "Gather", "why": ""}
