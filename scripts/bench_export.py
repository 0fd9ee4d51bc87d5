"""Latency, file size and accuracy of float, W8A8, W4 and W2, in onnxruntime and in torch, side by side in one run.

    python scripts/bench_export.py --models FOLDER resnet-18 mobilenet_v2 mobilebert --threads 1 \
      --calibration_file train.parquet --validation_file test.parquet

A model is a folder with a trained image classifier (its accuracy is measured on the validation file), or the name of one to be
made with random weights, for which latency and size are all there is. Everything of a model takes turns in every round: quote
the ratios. Torch is timed twice: weights packed in memory, and unpacked once at load. Numbers and operators go to metrics.json.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PreTrainedModel,
)

import common
import data_files
import measuring
import vision_models
from benching import medians, processor
from hf_r2 import R2QuantConfig, packed_in_memory, quantize
from hf_r2.deployed import deployed_table
from hf_r2.export.onnx import OPSET, check_packages, exported, to_onnx
from images import Pictures

WIDTH = re.compile(r"W([1-8])(A8)?( seams)?")
FLOAT = "float"
Batches = list[dict[str, Tensor]]


@dataclass
class BenchArguments:
    """What to export and time."""

    models: list[str] = field(
        default_factory=lambda: ["resnet-18", "mobilenet_v2", "mobilebert"],
        metadata={"help": f"Folders of image classifiers, or of {', '.join(vision_models.NEW)}, mobilebert."},
    )
    widths: list[str] = field(
        default_factory=lambda: ["W8A8", "W8A8 seams", "W4", "W2"],
        metadata={"help": "Widths of weights and inputs; with seams the sums between layers are quantized, too."},
    )
    method: str = field(default="squant", metadata={"help": "Post-training method that rounds the weights."})
    calibration_file: str | None = field(default=None, metadata={"help": "Local parquet of images, for folders."})
    calibration_samples: int = field(default=64, metadata={"help": "Images, or random inputs, to calibrate on."})
    validation_file: str | None = field(default=None, metadata={"help": "Local parquet of images with labels."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on so many; default: all."})
    image_size: int = field(default=224, metadata={"help": "Images are squares of so many pixels."})
    length: int = field(default=128, metadata={"help": "Tokens of a text."})
    threads: int = field(default=1, metadata={"help": "Threads of both runtimes."})
    turn_s: float = field(
        default=0.1, metadata={"help": "Seconds of a turn: so many calls that caches are warm, as they are in use."}
    )
    rounds: int = field(default=9, metadata={"help": "Rounds after one of warm-up; medians are taken (at least 9)."})
    output_dir: str = field(default="runs/bench_export", metadata={"help": "Where metrics.json goes."})


@dataclass
class Candidate:
    """One model at one width: what is timed, `runs` {runtime: call}, and the row of results so far."""

    width: str
    runs: dict[str, Callable[[], object]]
    row: dict[str, Any]


def build(name: str, args: BenchArguments) -> PreTrainedModel:
    """A trained model from a folder, or one with random weights; those of convolutions drawn so that no layer's output dies."""
    if Path(name).is_dir():
        return common.load_model(AutoModelForImageClassification, name).eval()
    torch.manual_seed(0)
    if name == "mobilebert":
        return MobileBertForSequenceClassification(MobileBertConfig()).eval()
    model = vision_models.new(name, [str(i) for i in range(1000)], args.image_size).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def random_batches(model: PreTrainedModel, args: BenchArguments) -> Batches:
    """Random inputs, one in a batch."""
    draw = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = (1, model.config.num_channels, args.image_size, args.image_size)
        return [{"pixel_values": torch.randn(size, generator=draw)} for _ in range(args.calibration_samples)]
    ids = torch.randint(3, model.config.vocab_size, (args.calibration_samples, 1, args.length), generator=draw)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def pictures(name: str, file: str, most: int | None, args: BenchArguments) -> Pictures:
    """Images of a file, prepared for the model in a folder."""
    return Pictures(measuring.first(data_files.read(file), most), args.image_size, name, file)


class OnnxModel:
    """A file in onnxruntime, called like a model."""

    def __init__(self, file: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        self.session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        self.taken = [i.name for i in self.session.get_inputs()]

    def __call__(self, batch: dict[str, Tensor]) -> np.ndarray:
        """The logits."""
        found: Any = self.session.run(["logits"], {name: batch[name].numpy() for name in self.taken})
        return found[0]


@torch.no_grad()
def torch_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> np.ndarray:
    """The logits of a model in torch."""
    return model(**batch).logits.numpy()


def float_candidate(
    model: PreTrainedModel, inputs: dict[str, Tensor], folder: Path, args: BenchArguments
) -> Candidate:
    """The float model, in onnxruntime by transformers' own exporter."""
    import onnx_ir

    file = folder / "float.onnx"
    program = exported(copy.deepcopy(model), inputs, dynamic=False, opset=OPSET, optimize=True)
    file.write_bytes(onnx_ir.to_proto(program).SerializeToString())
    model.save_pretrained(folder / "float")
    runs = {"onnxruntime": OnnxModel(file, args.threads), "torch": lambda batch: torch_logits(model, batch)}
    sizes = {"onnxruntime": file.stat().st_size, "torch": (folder / "float/model.safetensors").stat().st_size}
    return Candidate(FLOAT, runs, {"width": FLOAT, "size_bytes": sizes, "operators": {}, "float_layers": {}})


def quantized_candidate(
    model: PreTrainedModel, width: str, batches: Batches, folder: Path, args: BenchArguments
) -> Candidate:
    """The model at one width: exported, packed in memory, and unpacked at load."""
    match = WIDTH.fullmatch(width)
    if match is None:
        raise ValueError(f"widths are written W8A8, 'W8A8 seams' or W4, got {width!r}")
    act_bits = 8 if match[2] else None
    config = R2QuantConfig(args.method, weight_bits=int(match[1]), act_bits=act_bits, symmetric=True)
    unpacked = quantize(model, config, batches)
    unpacked.save_pretrained(folder / width)
    with packed_in_memory():
        packed = type(model).from_pretrained(folder / width).eval()
    file = folder / f"{width}.onnx"
    said = to_onnx(unpacked, file, batches[0], seams=batches if match[3] else None)
    runs = {
        "onnxruntime": OnnxModel(file, args.threads),
        "torch": lambda batch: torch_logits(unpacked, batch),
        "torch packed": lambda batch: torch_logits(packed, batch),
    }
    sizes = {"onnxruntime": said["size_bytes"], "torch": (folder / width / "model.safetensors").stat().st_size}
    kept = {key: said[key] for key in ("operators", "float_layers", "seams", "notes")}
    return Candidate(width, runs, {"width": width, "size_bytes": sizes, "layers": len(said["layers"]), **kept})


def compare(candidates: list[Candidate], validation: Pictures) -> None:
    """Accuracy in both runtimes, and how far their logits and guesses are apart, into the rows.

    Beside it how far torch is from itself on batches of 50: where its sums are rounded in another order, a value half way
    between two codes becomes the other one, and so on from layer to layer. Runtimes cannot be closer than that.
    """
    labels = validation.labels.numpy()
    batches, large = validation.batches(1), validation.batches(50)
    for candidate in candidates:
        found = {
            name: np.concatenate([candidate.runs[name](batch) for batch in batches])  # type: ignore[call-arg]
            for name in ("onnxruntime", "torch")
        }
        again = np.concatenate([candidate.runs["torch"](batch) for batch in large])  # type: ignore[call-arg]
        candidate.row["accuracy"] = {name: float((v.argmax(1) == labels).mean()) for name, v in found.items()}
        candidate.row["logits_apart"] = apart(found["onnxruntime"], found["torch"])
        candidate.row["torch_apart"] = apart(again, found["torch"])
        candidate.row["same_guess"] = float((found["onnxruntime"].argmax(1) == found["torch"].argmax(1)).mean())


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of a sample's logits over its largest logit, the median of all samples."""
    return float(np.median(np.abs(one - other).max(1) / np.abs(other).max(1)))


def latencies(candidates: list[Candidate], batch: dict[str, Tensor], args: BenchArguments) -> dict[Any, float]:
    """Seconds of a call by number of the candidate and runtime; they take turns of `turn_s` each."""
    turns, calls = {}, {}
    for number, candidate in enumerate(candidates):
        for runtime, run in candidate.runs.items():
            once = lambda run=run: run(batch)  # noqa: E731
            seconds = medians({"": once}, 3)[""]
            count = calls[number, runtime] = max(1, round(args.turn_s / seconds))
            turns[number, runtime] = lambda once=once, count=count: [once() for _ in range(count)]
    found = medians(turns, args.rounds)
    return {key: seconds / calls[key] for key, seconds in found.items()}


def bench(name: str, args: BenchArguments, folder: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, trained = build(name, args), Path(name).is_dir()
    batches = random_batches(model, args)
    if trained and args.calibration_file is not None:
        batches = pictures(name, args.calibration_file, args.calibration_samples, args).batches(1)
    candidates = [float_candidate(model, batches[0], folder, args)]
    candidates += [quantized_candidate(model, width, batches, folder, args) for width in args.widths]
    if trained and args.validation_file is not None:
        compare(candidates, pictures(name, args.validation_file, args.max_eval_samples, args))
    for c in candidates:
        c.row["latency_s"] = {}
    for (c, runtime), seconds in latencies(candidates, batches[0], args).items():
        candidates[c].row["latency_s"][runtime] = seconds
    for c in candidates:
        c.row["model"] = Path(name).name if trained else name
    return [c.row for c in candidates]


def head(args: BenchArguments) -> str:
    """What the numbers depend on."""
    versions = f"torch {torch.__version__}, onnxruntime {common.version_of('onnxruntime')}"
    return f"{processor()}; {versions}, threads: {args.threads}, one sample, medians of {args.rounds} turns of {args.turn_s} s"


def operators_line(row: dict[str, Any]) -> str:
    """Which integer operators onnxruntime runs a model on, and how many layers stayed float."""
    counts = {k: n for k, n in row["operators"].items() if k.startswith("Q") or "Integer" in k or "NBits" in k}
    floats = len(row["float_layers"])
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no integer operator"
    agree = ""
    if "logits_apart" in row:
        agree = f"; logits {100 * row['logits_apart']:.2g} % from torch's (torch, in other batches, from itself: "
        agree += f"{100 * row['torch_apart']:.2g} %), guesses {100 * row['same_guess']:.1f} % the same"
    return f"  {row['model']} {row['width']}: {text}; {floats} of {row['layers']} layers float{agree}"


def main() -> None:
    """Bench every model, print tables, keep the numbers."""
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if args.rounds < 9:
        raise ValueError(f"rounds must be at least 9 for a median that can be quoted, got {args.rounds}")
    check_packages()
    torch.set_num_threads(args.threads)
    print(head(args))
    rows: list[dict[str, Any]] = []
    content = {"head": head(args), "deployed": rows, **common.provenance(asdict(args), 0)}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            found = bench(name, args, Path(folder))
        rows += found
        common.write_json(Path(args.output_dir) / "metrics.json", content)
        print("\n" + deployed_table(found))
        for row in found[1:]:
            print(operators_line(row))


if __name__ == "__main__":
    main()
