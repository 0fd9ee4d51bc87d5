"""What the scripts share: where a run came from, rows of results, files that are written whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets.config
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import get_session
from torch import nn
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_r2 import R2QuantConfig
from hf_r2.metrics import Accuracy
from hf_r2.model_card import FRACTIONS
from hf_r2.report import checkpoint_bytes, report

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hf_r2", "torch", "transformers", "datasets", "accelerate", "evaluate")
HUB_PROBE_S = 5.0
LOCAL = "Give a local folder with --model_name_or_path"


def go_offline_if_hub_is_unreachable() -> None:
    """Switches the hub clients to their offline mode (local files and caches) when the hub gives no answer in seconds.

    Left alone they repeat every request for minutes before they say so.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_S)
    except (HTTPError, OSError):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def provenance(arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What made a run: command, arguments, seed, commit and versions, as metrics.json and the card want them."""
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    return {"command": command(), "arguments": arguments, "seed": seed, "commit": git_commit(), "versions": versions}


def version_of(package: str) -> str:
    """Version of an installed package; "not installed" for a source tree that is only on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def command() -> str:
    """The command line of this process as one would type it in the root of the project."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    return f"{launcher} {shlex.join([name, *sys.argv[1:]])}"


def git_commit() -> str:
    """Hash of the checked-out commit, with "+changes" where tracked files differ from it; "unknown" without git."""
    try:
        run = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run[0] + ("+changes" if run[1] else "")


def float_row(name: str, model: nn.Module, score: Mapping[str, Any], range_loss: str | None) -> dict[str, Any]:
    """The float model's row of results: its own width, all tensors of its checkpoint; `score` is the metric by its name."""
    size = checkpoint_bytes(model)
    bits = max((p.element_size() * 8 for p in model.parameters()), default=32)
    return {
        "name": name, "method": None, "weight_bits": None, "act_bits": None, "granularity": None, **score,
        "bits_per_weight": float(bits), "size_bytes": size, "range_loss": range_loss,
        "compression": 2 * sum(p.numel() for p in model.parameters()) / max(size, 1),
    }  # fmt: skip


def packed_row(
    name: str, packed: nn.Module, config: R2QuantConfig, score: Mapping[str, Any], range_loss: str | None
) -> dict[str, Any]:
    """A packed model's row of results; sizes and the policy for first and last layers come from its report."""
    sizes = report(packed)
    return {
        "name": name, "method": config.method, "weight_bits": config.weight_bits, "act_bits": config.act_bits,
        "granularity": config.granularity, **score, "range_loss": range_loss,
        **{key: sizes[key] for key in ("bits_per_weight", "bits_per_weight_all", "size_bytes")},
        **{key: sizes[key] for key in ("compression", "storage", "entropy", "policy")},
    }  # fmt: skip


def table(rows: Iterable[Mapping[str, Any]], metric: str = "accuracy") -> str:
    """Rows of results as a Markdown table; fractions in percent, BLEU as it is, sizes in MB (10^6 bytes)."""
    percent = metric in FRACTIONS
    heads = ["model", f"{metric}{' %' if percent else ''}", "bits per weight", "size MB", "times smaller than float16"]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|"]
    for r in rows:
        score, size = r[metric] * (100 if percent else 1), r["size_bytes"] / 1e6
        lines.append(
            f"| {r['name']} | {score:.2f} | {r['bits_per_weight']:.2f} | {size:.3f} | {r['compression']:.2f} |"
        )
    return "\n".join(lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes beside and renames, so that a kill leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def check_counts(args: Any, *names: str) -> None:
    """Raises ValueError for a flag below 1 among `names`; None is allowed."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(args, name)}")


def json_object(text: str, flag: str) -> dict[str, Any]:
    """What a flag holds as JSON; raises ValueError, naming the flag, for anything but an object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{flag} must be JSON, like {{"name": 1}}, got {text!r}: {error}') from error
    if not isinstance(found, dict):
        raise ValueError(f'{flag} must be a JSON object, like {{"name": 1}}, got {text!r}')
    return found


def same_logits(one: nn.Module, other: nn.Module, batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether two models give the same logits for `batch`, to the bit; the second is moved to where the first is."""
    device = next(one.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    with torch.no_grad():
        return torch.equal(one.eval()(**batch).logits, other.to(device).eval()(**batch).logits)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad; ends with one line where it cannot be had, or has no pad token."""
    try:
        with warnings.catch_warnings():  # Marian's, without sacremoses, leaves punctuation as it is and recommends it
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot load a tokenizer from {name!r}: {str(error).splitlines()[0]}. {LOCAL}") from error
    if tokenizer.pad_token is None:
        raise SystemExit(f"the tokenizer of {name!r} has no pad token, which batches need: set one and save it there")
    return tokenizer


def load_model(auto: Any, name: str, **options: Any) -> PreTrainedModel:
    """A float model in float32 (a packed one as it is); ends with one line where it cannot be had or does not fit."""
    if not Path(name).is_dir():
        go_offline_if_hub_is_unreachable()
    try:
        model = auto.from_pretrained(name, **options)
        return model if getattr(model, "is_quantized", False) else model.float()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a head of another size
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SystemExit(f"cannot load {name!r} from a folder, the hub or its cache: {reason}. {LOCAL}") from error


def accuracy(model: nn.Module, training: TrainingArguments, data: Any, collator: Any) -> float:
    """Share of right classes, 0 to 1, over all processes. By the plain Trainer: a packed model has no float weight."""

    def count(prediction: EvalPrediction) -> dict[str, float]:
        found = {"predictions": prediction.predictions, "references": prediction.label_ids}
        return Accuracy(keep_in_memory=True).compute(**found)  # type: ignore[return-value]

    options = copy.copy(training)
    options.dataloader_drop_last = False  # else it would hold for the last images that are measured on, too
    trainer = Trainer(
        model, options, eval_dataset=data, data_collator=collator, compute_metrics=count,
        preprocess_logits_for_metrics=lambda logits, _: classes(logits),
    )  # fmt: skip
    return trainer.evaluate()["eval_accuracy"]


def classes(logits: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The class of the largest logit; a head may give hidden states behind its logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
