"""Pushes a saved model to the Hub: weights, card and tokenizer in one commit."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, by the version of huggingface_hub
    OfflineModeIsEnabled,
)

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model*.safetensors", INDEX)
# Optimizer states and training arguments are pickles, which nobody should have to load; hidden folders are caches.
LEFT_OUT = (".*", "checkpoint-*", "runs", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle")


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Add model, card and tokenizer",
) -> str:
    """Uploads a folder that `save_pretrained` and `write_card` filled, as one commit; returns the commit's URL.

    The repository is created where it does not exist, and so is the branch `revision`. Safetensors files that an
    earlier push left and this folder no longer has are deleted in the same commit: a stale `model.safetensors` would
    be loaded in place of new shards. Hidden files, pickles, `runs` and `checkpoint-*` folders stay at home. A folder
    that is on the Hub already, unchanged, makes no commit: the URL is that of the last one. The token is the one of
    `hf auth login` or of the variable `HF_TOKEN`.

    Raises ValueError when the folder lacks config.json, safetensors weights or README.md, PermissionError when the Hub
    refuses the token, ConnectionError when it cannot be reached.
    """
    folder = Path(folder)
    paths = _check_folder(folder)
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # fills in the user's own name
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [path for path in there if _matches(path, WEIGHTS) and path not in paths]
        # Not `upload_folder`: with hf_xet installed it may split a large folder into several commits.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, folder / path) for path in paths),
            ],
            commit_message=commit_message,
            revision=revision,
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub at {api.endpoint} refused to write {repo_id!r} (HTTP {error.response.status_code}): "
                "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
            ) from error
        raise
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"cannot reach the Hub at {api.endpoint} ({reason}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            f"then push again; the model is safe in {folder}"
        ) from error
    return commit.commit_url


def _check_folder(folder: Path) -> list[str]:
    """Paths of the files to push, relative to `folder`; ValueError names all that a loadable model lacks."""
    if not folder.is_dir():
        raise ValueError(f"cannot push {folder}: it is not a folder; give one that save_pretrained wrote")
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    paths = [path for path in paths if not any(_matches(part, LEFT_OUT) for part in PurePosixPath(path).parts)]
    missing = [name for name in ("config.json", "README.md") if name not in paths]
    if not any(_matches(path, ("model*.safetensors",)) for path in paths):
        missing.append("model.safetensors")
    if INDEX in paths:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        missing += sorted({shard for shard in shards if shard not in paths})
    if missing:
        raise ValueError(
            f"cannot push {folder}: it lacks {', '.join(missing)}; "
            "save_pretrained writes config.json and the weights, hf_r2.model_card.write_card writes README.md"
        )
    return paths


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
