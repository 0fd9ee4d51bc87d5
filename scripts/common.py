"""What the scripts share: loading, evaluating and writing down."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from hf_r2 import RangeLoss
from hf_r2.metrics import Accuracy


@torch.inference_mode()
def evaluate_classifier(
    model: nn.Module, data: Dataset, tokenizer: Any, batch_size: int = 64, name: str = ""
) -> float:
    """Accuracy, 0 to 1; batches hold texts of like length, so that little is spent on padding."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    predictions, references = [], []
    for start in tqdm(range(0, len(order), batch_size), desc=f"evaluating {name}", leave=False):
        batch = collate([data[i] for i in order[start : start + batch_size]]).to(device)
        references += batch.pop("labels").tolist()
        predictions += model(**batch).logits.argmax(-1).tolist()
    model.train(was_training)
    result = Accuracy().compute(predictions=predictions, references=references)
    assert result is not None  # None is for the other processes of a distributed metric
    return result["accuracy"]


def range_summary(model: nn.Module) -> list[dict[str, Any]]:
    """Range, std and kurtosis of every weight of a float model."""
    return RangeLoss(model, "l_inf").summary()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import accelerate
    import datasets

    import hf_r2

    packages = {m.__name__: m.__version__ for m in (torch, transformers, datasets, accelerate)}
    return {"python": platform.python_version(), "hf_r2": hf_r2.__version__, **packages}


def git_commit() -> str | None:
    """Commit of the checkout this script lies in, with "+changes" where files differ from it; None outside of one."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def command() -> str:
    """The command line, with the script named as from the root of the checkout."""
    return " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def arguments_of(*groups: Any) -> dict[str, Any]:
    """All options of these dataclasses that JSON can hold, tokens left out."""
    found: dict[str, Any] = {}
    for group in groups:
        values = group.to_dict() if hasattr(group, "to_dict") else asdict(group)
        found |= {k: v for k, v in values.items() if not k.endswith("token")}
    return json.loads(json.dumps(found, default=str))


def write_json(path: Path, content: Any) -> None:
    """JSON, written beside and renamed, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2, default=str) + "\n")
    beside.replace(path)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds, rounded to tenths."""
        return round(time.perf_counter() - self.start, 1)
