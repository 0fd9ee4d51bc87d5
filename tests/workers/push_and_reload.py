"""Pushes folders to the Hub that HF_ENDPOINT names and reloads them by id, as a user's process would.

`python push_and_reload.py REPO_ID FOLDER [FOLDER ...]` pushes each folder in turn to the same repository and prints
one JSON object. Its own process, because huggingface_hub reads its environment once, at import.
"""

import json
import sys

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_r2  # noqa: F401  (registers the quantizer)
from hf_r2.hub import push_folder

SENTENCE = "what is the range of a weight"


def push_and_reload(folder: str, repo_id: str) -> dict:
    """Pushes, then reloads by the id, and by the revision of this push: logits and how many commits the push made."""
    before = commits(repo_id)
    url = push_folder(folder, repo_id)
    sha = url.rsplit("/", 1)[-1]
    here = logits(folder)
    return {
        "url": url,
        "sha": sha,
        "new_commits": commits(repo_id) - before,
        "files": sorted(HfApi().list_repo_files(repo_id)),
        "same_by_id": torch.equal(here, logits(repo_id)),
        "same_by_revision": torch.equal(here, logits(repo_id, revision=sha)),
        "logits": here.tolist(),
    }


def commits(repo_id: str) -> int:
    api = HfApi()
    return len(list(api.list_repo_commits(repo_id))) if api.repo_exists(repo_id) else 1  # creating makes one


def logits(name: str, revision: str = "main") -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(name, revision=revision)(SENTENCE, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(name, revision=revision).eval()
    with torch.no_grad():
        return model(**tokens).logits


if __name__ == "__main__":
    repo_id, *folders = sys.argv[1:]
    pushes = [push_and_reload(folder, repo_id) for folder in folders]
    first = logits(repo_id, revision=pushes[0]["sha"]).tolist()
    print(json.dumps({"pushes": pushes, "first_by_revision": first}))
