"""Packed models as Core ML programs whose weights stay palettes or integers (constexpr operations), for macOS 15 and iOS 18 on.

coremltools reads how a weight is compressed from buffers beside it (its guide: "Converting a compressed PyTorch model"); it
finds the codes again as the nearest entries of the palette, which for weights that are entries is exact.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_r2.attach import refuse_prepared
from hf_r2.encoders.base import Encoded
from hf_r2.graph import example_inputs
from hf_r2.packed_layers import adapter_of, dequantize_layer_, encoded, packed_layers

PRECISIONS = ("float32", "float16")
INDEX_BITS = (
    1,
    2,
    3,
    4,
    6,
    8,
)  # of Core ML's palettes; in between, a palette is filled up with entries that no code names
INTEGER_BITS = (4, 8)
PALETTE, INTEGERS = 2, 3  # coremltools' numbers for palettization and quantization
QUIET = ("coremltools", "py.warnings")


def to_coreml(
    model: PreTrainedModel,
    file: str | Path,
    inputs: Mapping[str, Any] | None = None,
    *,
    precision: str = "float32",
) -> dict[str, Any]:
    """Writes a packed `model` as an ML program to `file`, a folder that ends in .mlpackage, and reports on it.

    Palettes become `constexpr_lut_to_dense` (1, 2, 3, 4, 6 and 8 bits; vectors along the output channels), times
    `constexpr_blockwise_shift_scale` where there is a scale; grids of 4 and 8 bits become the latter alone, other grids
    palettes of their levels. The decoded weights are the model's to the bit in "float32"; in "float16", Core ML's default,
    palettes and scales are rounded. Inputs of layers are not rounded: `notes` says where the model does.

    Args:
        inputs: keyword arguments of `forward`, whose shapes the program has; None: made from the model's config.
        precision: "float32" or "float16", of everything that is computed, palettes included.

    Returns a dict: `size_bytes`, `operators` {name: count}, `layers` {name: {"mode": "palette", "integer" or "float"}},
    `float_layers` {name: why} and `notes`.

    Raises ImportError without coremltools, ValueError for a model that is not packed or that coremltools cannot convert.
    """
    check_package()
    _check(model, file, precision)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    inputs = example_inputs(model) if inputs is None else dict(inputs)
    dressed, reasons = _dressed(model)
    program = _converted(_Logits(dressed, list(inputs)), inputs, precision)
    program.save(str(file))
    operators = operators_of(program.get_spec())
    layers = {
        name: {"mode": "float" if name in reasons else _mode(encoded(layer))}
        for name, layer in packed_layers(model).items()
    }
    notes = [
        f"{name}: its inputs are rounded to {layer.__dict__['weight_layout'].act_bits} bits in this model, not in the program"
        for name, layer in packed_layers(model).items()
        if "input_quantizer" in layer._modules
    ]
    size = sum(f.stat().st_size for f in Path(file).rglob("*") if f.is_file())
    return {"size_bytes": size, "operators": operators, "layers": layers, "float_layers": reasons, "notes": notes}


def check_package() -> None:
    """Raises ImportError with the pip command where coremltools is missing."""
    if find_spec("coremltools") is None:
        raise ImportError("Core ML export needs coremltools: pip install '.[coreml]' in the folder of hf_r2's source")


def _check(model: nn.Module, file: str | Path, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if Path(file).suffix != ".mlpackage":
        raise ValueError(f"an ML program is a folder that ends in .mlpackage, got {str(file)!r}")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"to_coreml takes a transformers model, got a {type(model).__name__}")
    refuse_prepared(model)
    if not packed_layers(model):
        raise ValueError("to_coreml needs a packed model: call hf_r2.quantize(model, config) first")


class _Logits(nn.Module):
    """A model that takes its inputs by position and gives its logits alone."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        """The logits."""
        return self.model(**dict(zip(self.names, values, strict=True))).logits


def _dressed(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, str]]:
    """A copy with float weights and coremltools' buffers beside them, and the layers that have to stay float."""
    plain, reasons = copy.deepcopy(model), {}
    shared: dict[int, nn.Parameter] = {}
    for name, module in packed_layers(plain).items():
        e, key = encoded(module), id(module.weight_packed)
        if key not in shared:
            shared[key] = nn.Parameter(e.decode(), requires_grad=False)
        adapted = adapter_of(module) is not None
        dequantize_layer_(module, shared[key])
        found = "it has a low-rank adapter" if adapted else _buffers(e)
        if isinstance(found, str):
            reasons[name] = found
            continue
        for field, value in found.items():
            module.register_buffer(f"_COREML_/weight/{field}", value)
    return nn.Module.float(plain).eval(), reasons  # type: ignore[return-value]


def _mode(e: Encoded) -> str:
    whole = e.centroids is None and e.bits in INTEGER_BITS
    return "integer" if whole else "palette"


def _buffers(e: Encoded) -> dict[str, Tensor] | str:
    """How a weight is compressed, in coremltools' words, or why it cannot be."""
    if _mode(e) == "integer":
        assert e.scale is not None and e.zero_point is not None
        return {
            "compression_type": torch.tensor([INTEGERS]), "quantization_n_bits": torch.tensor(e.bits),
            "quantization_scale": e.scale, "zero_point": e.zero_point.expand_as(e.scale).to(torch.int16),
        }  # fmt: skip
    kind = {"compression_type": torch.tensor([PALETTE])}
    rank = len(e.weight_shape)
    if e.centroids is not None:
        if e.dim > 1 and e.weight_shape[0] % e.dim:
            return f"{e.weight_shape[0]} output channels are no multiple of its vectors' {e.dim}"
        scale = {} if e.scale is None else {"palettization_scale": e.scale}
        axis = {"vector_axis": torch.tensor(0)} if e.dim > 1 else {}
        return {**kind, **axis, **scale, "lut": _filled(e.centroids).view(*[1] * rank, -1, e.dim)}
    assert e.scale is not None and e.zero_point is not None
    levels = torch.arange(2**e.bits, dtype=torch.float32)
    if e.symmetric:  # one palette of steps, and a scale for each channel
        steps = _filled((levels - e.zero_point.flatten()[0])[:, None])
        return {**kind, "lut": steps.view(*[1] * rank, -1, 1), "palettization_scale": e.scale}
    own = (levels - e.zero_point[..., None]) * e.scale[..., None]  # a palette for each channel
    entries = 2 ** next(bits for bits in INDEX_BITS if bits >= e.bits)
    more = own[..., :1].expand(*own.shape[:-1], entries - own.shape[-1])
    return {**kind, "lut": torch.cat([own, more], -1)[..., None]}


def _filled(entries: Tensor) -> Tensor:
    """A palette with as many entries as Core ML's next index width has; the first again and again behind the last."""
    whole = 2 ** next(bits for bits in INDEX_BITS if 2**bits >= entries.shape[0])
    return torch.cat([entries, entries[:1].expand(whole - entries.shape[0], -1)])


def _converted(model: _Logits, inputs: Mapping[str, Tensor], precision: str) -> Any:
    levels = {name: logging.getLogger(name).level for name in QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coremltools has not been tried with this torch, and casts ids to int32
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            import coremltools as ct

            graph = torch.export.export(model, tuple(inputs.values())).run_decompositions(_decompositions())
            return ct.convert(
                graph,
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=getattr(ct.precision, precision.upper()),
                skip_model_load=True,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"coremltools cannot convert {type(model.model).__name__}: {reason}") from error
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _decompositions() -> dict[Any, Any]:
    """What coremltools' reader lacks, by what it has: the masks of transformers are made of these."""
    known, aten = torch.export.default_decompositions(), torch.ops.aten
    table = {op: known[op] for op in known if str(op).startswith(("aten.new_", "aten.where.Scalar"))}
    logic = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor}
    return {**table, **logic, aten.alias.default: lambda x: x}


def operators_of(spec: Any) -> dict[str, int]:
    """Operators of an ML program's protobuf, with counts; constants left out."""
    counts: dict[str, int] = {}
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                if operation.type != "const":
                    counts[operation.type] = counts.get(operation.type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
