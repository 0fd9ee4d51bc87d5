"""The road that the training scripts share: train, pack by each recipe, measure, save, check, write, push, print."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
)

import common
import interrupts
from hf_r2 import ENCODERS, R2QuantConfig, RangeLoss, convert, prepare, quantize
from hf_r2.hub import push_folder
from hf_r2.layers import weight_layers
from hf_r2.model_card import write_card
from hf_r2.plots import plot_accuracy, plot_ranges, plot_weights


@dataclass
class RecipeArguments:
    """Which packed models to make of the trained one; ValueError for steps below 0."""

    weight_bits: list[int] = field(
        default_factory=lambda: [8, 4, 3, 2], metadata={"help": "Widths for rounding to nearest, 1 to 8 each."}
    )
    granularity: str = field(
        default="per_tensor",
        metadata={"help": "Scales for rounding to nearest.", "choices": ["per_tensor", "per_channel"]},
    )
    dkm_bits: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Widths for clustering, 1 to 8 each."}
    )
    dkm_vectors: list[str] = field(
        default_factory=list,
        metadata={"help": "Clusterings of vectors, bits of a code / length of a vector: 2/2 4/4."},
    )
    dkm_steps: int = field(
        default=500, metadata={"help": "Training steps through the soft clusters; 0: k-means after training only."}
    )
    dkm_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of those steps."})
    dkm_tau: float | None = field(
        default=None,
        metadata={"help": "Temperature of the clustering, in units of each weight's variance; default: by its width."},
    )

    qat: list[str] = field(
        default_factory=list, metadata={"help": "Train on quantized, method-W(bits)A(bits): lsq-W4A4 pact-W2A2."}
    )
    qat_steps: int = field(default=500, metadata={"help": "Training steps of each, 1 or more."})
    qat_learning_rate: float = field(default=0.01, metadata={"help": "Learning rate of those steps."})

    def __post_init__(self) -> None:
        if self.dkm_steps < 0 or self.qat_steps < 1:
            raise ValueError(
                f"dkm_steps must be 0 or more and qat_steps 1 or more, got {self.dkm_steps} and {self.qat_steps}"
            )

    def configs(self) -> dict[str, R2QuantConfig]:
        """Name and recipe of each packed model; ValueError for a width that is not allowed."""
        g = self.granularity
        nearest = {f"nearest-{b}bit": R2QuantConfig("nearest", b, granularity=g) for b in self.weight_bits}
        dkm = {"granularity": "per_tensor", "options": {"tau": self.dkm_tau}}
        found = nearest | {f"dkm-{b}bit": R2QuantConfig("dkm", b, **dkm) for b in self.dkm_bits}
        for text in self.dkm_vectors:
            bits, length = _match(VECTORS, text, "dkm_vectors are written bits/length, like 4/4").groups()
            options = {"tau": self.dkm_tau, "dim": int(length)}
            found[f"dkm-{bits}bit-{length}dim"] = R2QuantConfig(
                "dkm", int(bits), granularity="per_tensor", options=options
            )
        for text in self.qat:
            method, bits, act_bits = _match(TRAINED, text, "qat is written method-W4A4, like lsq-W4A4").groups()
            if method not in ENCODERS or method == "dkm":
                allowed = ", ".join(name for name in ENCODERS if name != "dkm")
                raise ValueError(f"methods of qat are {allowed}; got {text!r}")
            found[text] = R2QuantConfig(method, int(bits), act_bits=int(act_bits))
        return found


VECTORS, TRAINED = re.compile(r"(\d+)/(\d+)"), re.compile(r"(\w+)-W(\d)A(\d)")


def _match(pattern: re.Pattern[str], text: str, rule: str) -> re.Match[str]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"{rule}; got {text!r}")
    return match


@dataclass(frozen=True)
class Track:
    """What one script brings to the road, once its model and data are there."""

    name: str  # of its arguments in metrics.json
    task: dict[str, str]  # what is measured on what, for the card
    auto: Any  # the auto class that loads a saved model
    processor: Any  # tokenizer or image processor, saved beside every model
    trainer: Callable[[nn.Module, Any], Trainer]  # a trainer of this model with these arguments
    measure: Callable[[PreTrainedModel], dict[str, Any]]  # the task's metric by its name, and what goes with it
    batch: Callable[[], Mapping[str, torch.Tensor]]  # a few inputs, on which a reloaded model must give the same
    notes: Callable[[], dict[str, Any]] = dict  # what else metrics.json should say at the end
    usage: Callable[[Path], str] = str  # what to type in Python to use the model in a folder


def parse(
    arguments: type,
    training: type,
    defaults: Mapping[str, Any],
    name: str,
    doc: str | None,
    recipe: Callable[[Namespace], Mapping[str, Any]] = lambda flags: {},
) -> tuple[Any, Any]:
    """Both groups of flags with the script's defaults; a value that is not allowed ends with one line.

    `recipe`: the defaults that follow from other flags. It is asked once these are parsed, however they were written.
    """
    parser = HfArgumentParser((arguments, training), description=doc)  # type: ignore[arg-type]
    parser.set_defaults(**defaults)
    try:
        parser.set_defaults(**recipe(parser.parse_known_args()[0]))
        args, options = parser.parse_args_into_dataclasses(look_for_args_file=False)  # the recipe would not know of it
        args.configs()
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{name}: {error}") from error
    return args, options


def run(model: PreTrainedModel, args: Any, training: Any, track: Track) -> None:
    """The whole road from a loaded model; metrics.json grows by a row as each model is measured.

    After Ctrl-C the same flags with --resume_from_checkpoint true go on: from the last step, or behind the last row.
    """
    out, start = Path(str(training.output_dir)), time.perf_counter()
    push, training.push_to_hub = training.push_to_hub, False  # Trainer would push checkpoints in commits of its own
    ranges = {"before training": RangeLoss(model).summary()}
    if training.process_index == 0 and not interrupts.asked_to_resume(training):
        for name in args.configs():
            interrupts.forget(out / f"{name}-training")  # of an earlier run, whose model was another
    trainer = track.trainer(model, training)
    interrupts.train(trainer, training)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  (files hold no channels-last tensors)
    try:
        ranges["after training"] = RangeLoss(model).summary()
        range_loss = training.range_loss if getattr(trainer, "range_loss", None) is not None else None
        rows, folders = make(model, args, training, track, range_loss)
        if training.process_index == 0:
            took = {
                "time_s": round(time.perf_counter() - start, 1),
                "ranges": ranges,
                "log": trainer.state.log_history,
            }
            took |= track.notes()
            write_results(metrics(args, training, track, rows), took, training, folders)
    except KeyboardInterrupt as stop:
        interrupts.keep_trained(trainer)
        if isinstance(stop, interrupts.Stopped):
            raise
        raise interrupts.Stopped(f"stopped; what is done is in {out}: {interrupts.GO_ON}") from stop
    if training.process_index == 0:
        if push:
            push_all(training, folders)
        print_results(rows, folders, track)


def make(
    model: PreTrainedModel, args: Any, training: Any, track: Track, range_loss: str | None
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Saves the trained `model` and a packed one of each recipe; their rows of results, and their folders."""
    out, main = Path(str(training.output_dir)), training.process_index == 0
    if main:
        save(model, track.processor, out / "float")
    rows = [common.float_row("float", model, track.measure(model), range_loss)]
    before = rows_before(metrics(args, training, track, rows), training)
    folders: dict[str, Path] = {}
    for name, config in args.configs().items():
        folders[name] = out / name
        if name in before:
            rows.append(before[name])
            continue
        packed = pack(model, config, args, training, track, out / f"{name}-training")
        rows.append(common.packed_row(name, packed, config, track.measure(packed), range_loss))
        if main:
            save(packed, track.processor, folders[name])
            draw_weights(model, packed, folders[name] / "weights.png")
            check_reload(packed, folders[name], track)
            common.write_json(out / "metrics.json", metrics(args, training, track, rows))
            interrupts.forget(out / f"{name}-training")
    return rows, folders


def rows_before(found: dict[str, Any], training: Any) -> dict[str, dict[str, Any]]:
    """Rows by name that an interrupted run wrote behind the very same float row, with the same flags and versions."""
    out = Path(str(training.output_dir))
    file = out / "metrics.json"
    if not interrupts.asked_to_resume(training) or training.world_size > 1 or not file.is_file():
        return {}
    old, new = json.loads(file.read_text()), json.loads(json.dumps(found, default=str))
    for content in (old, new):
        content["arguments"]["training"].pop("resume_from_checkpoint", None)
    same = all(old.get(key) == new[key] for key in ("arguments", "seed", "commit", "versions", "task"))
    if not same or old["results"][:1] != new["results"]:
        return {}
    return {row["name"]: row for row in old["results"][1:] if (out / row["name"] / "config.json").is_file()}


def pack(
    model: PreTrainedModel, config: R2QuantConfig, args: Any, training: Any, track: Track, folder: Path
) -> PreTrainedModel:
    """A packed copy of `model`; clustered and trained quantized for so many steps, with the same range loss, before.

    Ctrl-C leaves the state of those steps in `folder`, from which they go on.
    """
    steps, rate = args.dkm_steps, args.dkm_learning_rate
    if config.method != "dkm":
        steps, rate = (args.qat_steps, args.qat_learning_rate) if config.method in ENCODERS else (0, 0.0)
    if steps == 0:
        return quantize(model, config)
    options = copy.copy(training)
    options.max_steps, options.learning_rate = steps, rate
    options.save_strategy, options.output_dir = "no", str(folder)
    options.resume_from_checkpoint = "true" if any(folder.glob("checkpoint-*")) else None
    prepared = prepare(copy.deepcopy(model), config)
    interrupts.train(track.trainer(prepared, options), options)
    return convert(prepared)


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Model and tokenizer or image processor into one folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def draw_weights(model: nn.Module, packed: nn.Module, path: Path) -> None:
    """Plots the weights of the middle layer before and after."""
    layers = weight_layers(model)
    layer = layers[len(layers) // 2]
    plot_weights(layer.weight.detach(), packed.get_submodule(layer.name).weight.detach(), path, layer.name)  # type: ignore[union-attr,operator]


def check_reload(packed: PreTrainedModel, folder: Path, track: Track) -> None:
    """Loads the saved model as a user would, and compares logits to the bit."""
    if not common.same_logits(packed, track.auto.from_pretrained(folder), track.batch()):
        raise RuntimeError(f"the model reloaded from {folder} gives other logits than the one that was measured")


def metrics(args: Any, training: Any, track: Track, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What made the run and what it gave, as metrics.json and the cards want it."""
    arguments = {track.name: asdict(args), "training": training.to_dict()}
    return {**common.provenance(arguments, training.seed), "task": track.task, "results": rows}


def write_results(found: dict[str, Any], took: dict[str, Any], training: Any, folders: dict[str, Path]) -> None:
    """metrics.json, the plots, and a card with every packed model."""
    out, rows = Path(str(training.output_dir)), found["results"]
    common.write_json(out / "metrics.json", {**found, **took})
    plot_accuracy(rows, out / "accuracy.png", found["task"]["metric"])
    plot_ranges(took["ranges"], out / "ranges.png")
    policies = {row["name"]: row["policy"] for row in rows if row["name"] in folders}
    for name, folder in folders.items():
        for picture in ("accuracy.png", "ranges.png"):
            shutil.copyfile(out / picture, folder / picture)
        write_card(folder, {**found, "first_last": policies[name]}, result=name, repo_id=repo_id(training, name))
        common.write_json(folder / "metrics.json", {**found, "first_last": policies[name]})


def repo_id(training: Any, name: str) -> str:
    """Hub id of a packed model: `hub_model_id` (default: name of the output folder), and which model it is."""
    return f"{training.hub_model_id or Path(str(training.output_dir)).name}-{name}"


def push_all(training: Any, folders: dict[str, Path]) -> None:
    """One commit per model: weights, card and tokenizer."""
    for name, folder in folders.items():
        url = push_folder(folder, repo_id(training, name), private=bool(training.hub_private_repo))
        print(f"pushed {name}: {url}")


def print_results(rows: list[dict[str, Any]], folders: dict[str, Path], track: Track) -> None:
    """The table, where things are, and what to type next."""
    print(f"\n{common.table(rows, track.task['metric'])}\n")
    if not folders:
        return
    folder = next(iter(folders.values()))
    out = folder.parent
    print(f"In {out}: metrics.json, accuracy.png, ranges.png, and {len(folders)} packed models, each with its card.")
    print("Each was loaded again from its folder and gave the same logits. To use one, type in Python:\n")
    print(f"{track.usage(folder)}\n")
