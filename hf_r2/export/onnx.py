"""Packed models as ONNX files that run in onnxruntime, on integers where it has kernels for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_r2.attach import refuse_prepared
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.export.onnx_axes import check_free, free_axes, repeated
from hf_r2.export.onnx_dress import Form, dress_
from hf_r2.export.onnx_quiet import without_noise
from hf_r2.graph import example_inputs
from hf_r2.packed_layers import packed_layers
from hf_r2.saving import place_for

LOWEST_OPSET, OPSET, NEWEST_OPSET = 18, 20, 25  # of those beyond the newest, onnxscript has no graphs
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BLOCK_BITS, FAST_BLOCKS = (2, 4), (4,)  # widths of MatMulNBits; those that are as fast as a float weight
NO_SEAMS = (
    "no seams were placed: no convolution of quantized inputs, and no sum of such, has an output that is still float"
)
FOLD_LIMIT = 64  # constants up to so many elements are computed while exporting; weights stay packed


def to_onnx(
    model: PreTrainedModel,
    file: str | Path,
    inputs: Mapping[str, Any] | None = None,
    *,
    seams: Iterable[Mapping[str, Tensor]] | None = None,
    dynamic: bool = False,
    blocks: Iterable[int] = FAST_BLOCKS,
    opset: int = OPSET,
    names: Mapping[str, str] | None = None,
    outputs: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Writes a packed `model` to `file` (one ONNX file, weights packed as in the checkpoint) and reports on it.

    Args:
        inputs: keyword arguments of `forward` that the graph is read with; None: made from the model's config.
        seams: batches to calibrate grids for the values between layers that no layer's input quantizer covers (residual
            sums). It adds 8-bit roundings that `model` does not have, and lets a residual network stay integer throughout;
            None: the file computes what `model` does.
        dynamic: batch size, and the length of token inputs, may differ from `inputs`, of which one sample is enough.
        blocks: widths at which linear layers with float inputs stay packed in memory (MatMulNBits, which has 2 and 4 bits);
            the others are unpacked once, at load, like all other layers with float inputs. 2 is left out by default:
            onnxruntime computes it slower than the float model.
        opset: 18 to 25, if onnxruntime has it. No 4-bit types are needed: bytes that hold several codes are taken apart by
            shift and mask.
        names: other names for inputs of the graph.
        outputs: the outputs to keep, all by default (of generative models past key values, too).

    Returns a dict: `size_bytes`, `opset`, `operators` (of the graph as onnxruntime optimized it, with counts), `layers`
    {name: {"mode", "operator", "why"}}, `float_layers` {name: why}, `seams` (values that were quantized), `notes`.

    Raises ImportError for a missing package, ValueError for a model that is not packed, not calibrated or cannot be traced
    with these inputs, for one that fixes an axis that `dynamic` wants free, for seams without a batch, for an opset that is
    too low or too new, and for a `file` that is a folder. A missing folder of `file` is made.
    """
    check_packages()
    _check_model(model)
    _check_opset(opset)
    blocks = _checked_blocks(blocks)
    from hf_r2.export.onnx_report import KernelError, report_on

    file = place_for(file)
    inputs = example_inputs(model) if inputs is None else dict(inputs)
    seams = None if seams is None else list(seams)
    if seams is not None and not seams:
        raise ValueError("seams holds no batch: ranges of the values between layers are read off at least one")
    ends = (names or {}, None if outputs is None else tuple(outputs))
    forms, program, quantized = _program(model, inputs, seams, dynamic, blocks, opset, *ends)
    try:
        report = report_on(program, forms, file)
    except KernelError as error:
        if not any(form.mode == "blocks" for form in forms.values()):
            raise
        forms, program, quantized = _program(model, inputs, seams, dynamic, (), opset, *ends)
        report = report_on(program, forms, file)
        report["notes"].append(f"linear layers are unpacked at load: {error}")
    if seams is not None and not quantized:
        report["notes"].append(NO_SEAMS)
    return {"opset": opset, **report, "seams": quantized}


def _checked_blocks(blocks: Iterable[int]) -> tuple[int, ...]:
    blocks = tuple(blocks)
    if not set(blocks) <= set(BLOCK_BITS):
        raise ValueError(f"blocks are widths that MatMulNBits has, {BLOCK_BITS} or none, got {blocks}")
    return blocks


def check_packages() -> None:
    """Raises ImportError with the pip command where a package of the extra is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: pip install '.[onnx]' in the folder of hf_r2's source"
        )
    if find_spec("transformers.exporters") is None:
        raise ImportError("ONNX export needs the exporters of transformers 5.23: pip install --upgrade transformers")


def _check_opset(opset: int) -> None:
    import onnxruntime

    from hf_r2.export.onnx_report import runs

    if opset < LOWEST_OPSET:
        why = "has no BitwiseAnd, which unpacks weights"
    elif opset > NEWEST_OPSET:
        why = "is newer than the graphs that onnxscript makes"
    elif not runs(opset):
        why = f"is newer than onnxruntime {onnxruntime.__version__}"
    else:
        return
    newest = next(known for known in range(NEWEST_OPSET, OPSET - 1, -1) if known == OPSET or runs(known))
    raise ValueError(f"opset {opset} {why}: take {LOWEST_OPSET} to {newest}; {OPSET} is what is tested")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"to_onnx takes a transformers model, got a {type(model).__name__}")
    refuse_prepared(model)
    if not packed_layers(model):
        raise ValueError(
            "to_onnx needs a packed model: call hf_r2.quantize(model, config) first (transformers.exporters.OnnxExporter "
            "exports float ones)"
        )
    waiting = [
        name
        for name, layer in packed_layers(model).items()
        if isinstance(quantizer := layer._modules.get("input_quantizer"), InputQuantizer)
        and (not quantizer.ready or quantizer.observing)
    ]
    if waiting:
        raise ValueError(
            f"the inputs of {', '.join(waiting)} have no range yet: quantize with batches that reach them"
        )


def _program(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    seams: Iterable[Mapping[str, Tensor]] | None,
    dynamic: bool,
    blocks: tuple[int, ...],
    opset: int,
    names: Mapping[str, str],
    outputs: tuple[str, ...] | None,
) -> tuple[dict[str, Form], Any, list[str]]:
    """Forms of the layers, the finished graph (`onnx_ir.Model`), and the names of the seams that were quantized."""
    from onnxscript.optimizer import optimize_ir

    from hf_r2.export.onnx_graph import strip_, tidy_
    from hf_r2.export.onnx_seams import quantize_seams_

    dressed = _float32_copy(model)
    forms = dress_(dressed, blocks)
    program = exported(dressed, inputs, dynamic, opset)
    _settle_ends_(program.graph, names, outputs)
    optimize_ir(program, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    tidy_(program.graph)
    strip_(program)
    quantized = [] if seams is None else quantize_seams_(program, seams)
    tidy_(program.graph)
    return forms, program, quantized


def _settle_ends_(graph: Any, names: Mapping[str, str], outputs: tuple[str, ...] | None) -> None:
    """Renames inputs and drops outputs, in place; optimization takes out what only these need."""
    for value in graph.inputs:
        value.name = names.get(value.name, value.name)
    if outputs is not None:
        graph.outputs[:] = [value for value in graph.outputs if value.name in outputs]


def _float32_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32: what onnxruntime's CPU kernels compute in. (`model.float()` is refused for packed models.)"""
    return nn.Module.float(copy.deepcopy(model)).eval()  # type: ignore[return-value]


def exported(
    model: PreTrainedModel, inputs: Mapping[str, Any], dynamic: bool, opset: int, optimize: bool = False
) -> Any:
    """The graph of `model(**inputs)` as transformers' own exporter writes it, an `onnx_ir.Model`.

    Raises ValueError, with the exporter's reason, where it cannot, and where an axis that is to be free stays fixed.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs = repeated(inputs) if dynamic else dict(inputs)
    config = OnnxConfig(opset_version=opset, optimize=optimize, dynamic_shapes=free_axes(inputs) if dynamic else None)
    try:
        with without_noise():
            program = OnnxExporter().export(model, inputs, config=config).program
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sizes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
        hint = "; dynamic=False exports these shapes alone" if dynamic else ""
        raise ValueError(f"{type(model).__name__} cannot be exported with inputs {sizes}: {reason}{hint}") from error
    if dynamic:
        check_free(program.graph, inputs, type(model).__name__)  # type: ignore[union-attr]
    return program
