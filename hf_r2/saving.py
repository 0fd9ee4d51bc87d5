"""Saving so that a failure leaves what was there before: write beside, then rename."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def place_for(file: str | os.PathLike) -> Path:
    """The path of a file that is going to be written, its folder made; called before the work, which may take long.

    Raises ValueError where the path is a folder, OSError where its folder cannot be made.
    """
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file to write")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def save_beside(model: PreTrainedModel, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained` by way of a hidden folder next to `save_directory`.

    Everything is written and flushed to disk there first; then each file is renamed into place, weights before
    config.json. A full disk or a kill while writing leaves the old checkpoint as it was (and the hidden folder, which
    the next save removes). Takes the arguments of `save_pretrained`.
    """
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; save_pretrained needs a folder")
    staging = target.absolute().parent / f".{target.name}.saving"
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    if kwargs.get("is_main_process", True):
        shutil.rmtree(staging, ignore_errors=True)
    try:
        type(model).save_pretrained(model, staging, **kwargs)
        if kwargs.get("is_main_process", True):
            _move_into(staging, target)
    finally:
        if kwargs.get("is_main_process", True):
            shutil.rmtree(staging, ignore_errors=True)


def _move_into(staging: Path, target: Path) -> None:
    files = sorted((f for f in staging.rglob("*") if f.is_file()), key=lambda f: (f.name == "config.json", f.name))
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    target.mkdir(parents=True, exist_ok=True)
    old = {f.name for f in target.glob("model*.safetensors*")}
    for file in files:
        place = target / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    for name in old - {f.name for f in files}:  # shards of the save before, which nothing names any more
        (target / name).unlink()
