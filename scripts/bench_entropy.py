"""What entropy-coded storage saves: bits per weight of codes as they are packed, coded, and their entropy, which is the bound.

    python scripts/bench_entropy.py --models plain=runs/cifar/float range=runs/cifar/range --methods nearest squant

Models are float checkpoints, each as NAME=FOLDER. Only methods that need no data. Writes metrics.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel

import common
from hf_r2 import R2QuantConfig, quantize
from hf_r2.report import report


@dataclass
class EntropyArguments:
    """Which models, quantized how."""

    models: list[str] = field(metadata={"help": "Float checkpoints, each as NAME=FOLDER."})
    methods: list[str] = field(
        default_factory=lambda: ["nearest", "squant"], metadata={"help": "Methods without data."}
    )
    bits: list[int] = field(default_factory=lambda: [8, 4, 3, 2], metadata={"help": "Bits per weight."})
    granularities: list[str] = field(
        default_factory=lambda: ["per_tensor", "per_channel"], metadata={"help": "per_channel, per_tensor or both."}
    )
    output_dir: str = field(default="runs/entropy", metadata={"help": "Where metrics.json goes."})


def load(folder: str) -> PreTrainedModel:
    """A float checkpoint in the class that it was saved from."""
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder!r} is no folder: models are given as NAME=FOLDER")
    config = AutoConfig.from_pretrained(folder)
    if not config.architectures:
        raise SystemExit(f"{folder}: config.json names no architecture, so its class is not known")
    return common.load_model(getattr(transformers, config.architectures[0]), folder)


def row(name: str, model: PreTrainedModel, method: str, bits: int, granularity: str) -> dict[str, Any]:
    """Sizes of one model, quantized one way, packed and coded."""
    packed = quantize(model, R2QuantConfig(method=method, weight_bits=bits, granularity=granularity))
    dense = report(packed)
    packed.config.quantization_config.storage = "entropy"
    coded = report(packed)
    return {
        "name": name, "method": method, "weight_bits": bits, "granularity": granularity, "entropy": dense["entropy"],
        **{key: dense[key] for key in ("bits_per_weight", "size_bytes", "compression")},
        **{f"coded_{key}": coded[key] for key in ("bits_per_weight", "size_bytes", "compression")},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row: what is saved is that of the whole file."""
    heads = [
        "model",
        "method",
        "grid",
        "packed b/w",
        "coded b/w",
        "entropy of codes",
        "file smaller by",
        "times float16",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * 5]
    for r in rows:
        saved = 100 * (1 - r["coded_size_bytes"] / r["size_bytes"])
        lines.append(
            f"| {r['name']} | {r['method']} | {r['weight_bits']} bits {r['granularity']} | {r['bits_per_weight']:.2f} | "
            f"{r['coded_bits_per_weight']:.2f} | {r['entropy']:.2f} | {saved:.0f} % | "
            f"{r['compression']:.1f} to {r['coded_compression']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """All models, methods, grids and widths; the table."""
    (args,) = HfArgumentParser(EntropyArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    rows = []
    for text in args.models:
        name, _, folder = text.rpartition("=")
        model = load(folder)
        wanted = [(m, b, g) for m in args.methods for g in args.granularities for b in args.bits]
        for method, bits, granularity in tqdm(wanted, desc=name or folder):
            torch.manual_seed(0)
            rows.append(row(name or folder, model, method, bits, granularity))
    common.write_json(Path(args.output_dir) / "metrics.json", {**common.provenance(asdict(args), 0), "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
