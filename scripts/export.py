"""A packed checkpoint as a file for another runtime, with a report of what that runtime does with it.

    python scripts/export.py --model_name_or_path FOLDER --format onnx --output model.onnx --seam_file train.parquet
    python scripts/export.py --model_name_or_path FOLDER --format onnx-parts --output NEW_FOLDER
    python scripts/export.py --model_name_or_path FOLDER --format coreml --output model.mlpackage
    python scripts/export.py --model_name_or_path FOLDER --format native --output NEW_FOLDER

`onnx-parts` writes the encoder and the decoder of a translation model as two files, for any batch size and length.
`float` and `native` are checkpoints that transformers loads without hf_r2: decoded weights, and the integer linear layers that
transformers 5.23 has itself.

Images for `--seam_file`: parquet files with `image`; they set the grids of residual sums, which makes a residual network
integer throughout. Without it the file computes exactly the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import load_dataset
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel

import common
from hf_r2.export import coreml
from hf_r2.export.onnx import OPSET, check_packages, to_onnx
from hf_r2.export.onnx_parts import to_onnx_parts
from hf_r2.export.plain import to_float, to_native
from hf_r2.report import report
from images import Pictures

ONNX = ("onnx", "onnx-parts")
UNREAD = "--seam_file was not read: no seams were placed, they lie between the convolutions of an image model (--format onnx)"
FOLDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "float": to_float,
    "native": to_native,
}  # formats that are checkpoints


@dataclass
class ExportArguments:
    """What to export, and as what."""

    model_name_or_path: str = field(metadata={"help": "A packed checkpoint: a folder, or a name on the Hub."})
    output: str = field(metadata={"help": "The file or folder to write; the report goes beside it, as OUTPUT.json."})
    format: str = field(default="onnx", metadata={"help": "What to write.", "choices": [*ONNX, "coreml", *FOLDERS]})
    precision: str = field(
        default="float32", metadata={"help": "What a Core ML program computes in.", "choices": list(coreml.PRECISIONS)}
    )
    opset: int = field(default=OPSET, metadata={"help": "ONNX operator set, 18 to 25."})
    dynamic: bool = field(default=False, metadata={"help": "Leave batch size and text length open."})
    batch_size: int = field(default=1, metadata={"help": "Samples in a batch, where it is not left open."})
    length: int = field(default=128, metadata={"help": "Tokens of a text, where they are not left open."})
    image_size: int = field(default=224, metadata={"help": "Images are squares of so many pixels."})
    seam_file: str | None = field(default=None, metadata={"help": "Local parquet of images; residual networks only."})
    seam_samples: int = field(default=64, metadata={"help": "Images that are read of it."})


def load(name: str) -> PreTrainedModel:
    """The checkpoint in the class that it was saved from."""
    config = AutoConfig.from_pretrained(name)
    if not config.architectures:
        raise ValueError(f"{name}: config.json names no architecture, so its class is not known")
    return getattr(transformers, config.architectures[0]).from_pretrained(name).eval()


def example(model: PreTrainedModel, args: ExportArguments) -> dict[str, Any]:
    """Inputs of the shapes that are exported."""
    if model.main_input_name == "pixel_values":
        size = (args.batch_size, model.config.num_channels, args.image_size, args.image_size)
        return {"pixel_values": torch.zeros(size)}
    ids = torch.ones(args.batch_size, args.length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids.clone()} if model.config.is_encoder_decoder else {})


def write(model: PreTrainedModel, args: ExportArguments) -> dict[str, Any]:
    """Exports, and returns the report."""
    if args.format in FOLDERS:
        return FOLDERS[args.format](model, args.output)
    if args.format == "coreml":
        return coreml.to_coreml(model, args.output, example(model, args), precision=args.precision)
    if args.format == "onnx-parts":
        return together(to_onnx_parts(model, args.output, example(model, args), opset=args.opset))
    seams = None
    if takes_seams(model, args):
        data = load_dataset("parquet", data_files=args.seam_file, split=f"train[:{args.seam_samples}]")
        seams = Pictures(data, args.image_size, args.model_name_or_path, "seams").batches(args.batch_size)
    return to_onnx(model, args.output, example(model, args), seams=seams, dynamic=args.dynamic, opset=args.opset)


def takes_seams(model: PreTrainedModel, args: ExportArguments) -> bool:
    """Whether there is a seam file that can serve."""
    return args.seam_file is not None and args.format == "onnx" and model.main_input_name == "pixel_values"


def smaller(size: int, float16: int) -> str:
    """How a size compares with that of the float16 model, in words."""
    ratio = float16 / size
    return f"{ratio:.2f} times smaller than float16" if ratio >= 1 else f"{1 / ratio:.2f} times the size of float16"


def together(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One report of the reports of several files; their operators stay apart."""
    said: dict[str, Any] = {"size_bytes": sum(part["size_bytes"] for part in parts.values()), "layers": {}}
    said |= {"float_layers": {}, "notes": [], "operators": {name: part["operators"] for name, part in parts.items()}}
    for name, part in parts.items():
        said["layers"] |= {f"{name}: {layer}": entry for layer, entry in part["layers"].items()}
        said["float_layers"] |= {f"{name}: {layer}": why for layer, why in part["float_layers"].items()}
        said["notes"] += [f"{name}: {note}" for note in part["notes"]]
    return said


def main() -> None:
    """Load, export, say what runs on integers and what does not."""
    (args,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    try:
        if args.format in (*ONNX, "coreml"):
            (check_packages if args.format in ONNX else coreml.check_package)()
        common.go_offline_if_hub_is_unreachable()
        model, output = load(args.model_name_or_path), Path(args.output)
        said = write(model, args)
    except (ImportError, ValueError) as error:  # which say in a line what to do
        raise SystemExit(str(error)) from error
    if args.seam_file is not None and not takes_seams(model, args):
        said["notes"].append(UNREAD)
    common.write_json(output.with_name(output.name + ".json"), {**common.provenance(vars(args), 0), **said})
    whole, size = len(said["layers"]), said["size_bytes"]
    print(
        f"{output}: {size / 1e6:.2f} MB, {smaller(size, report(model)['float16_bytes'])}; "
        f"{whole - len(said['float_layers'])} of {whole} layers on packed or integer weights"
    )
    reasons: dict[str, list[str]] = {}
    for name, why in said["float_layers"].items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        print(f"  float: {why}: {', '.join(names)}")
    for note in said["notes"]:
        print(f"  {note}")


if __name__ == "__main__":
    main()
