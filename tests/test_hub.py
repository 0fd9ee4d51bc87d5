"""The Hub road end to end, against a stub of its HTTP API: push in one commit, reload by id and revision, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_r2 import R2QuantConfig, quantize
from hf_r2.hub import push_folder

HERE = Path(__file__).parent
VOCABULARY = "[PAD] [UNK] what is the range of a weight".split()


@pytest.fixture(scope="module")
def hub():
    """The address of a stub that runs in a process of its own."""
    command = [sys.executable, str(HERE / "hub_stub.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None
        yield stub.stdout.readline().strip()
        stub.terminate()


def client(arguments, endpoint, home):
    """Runs python with the variables that huggingface_hub reads at import."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(HERE.parent), "HF_TOKEN": "hf_stub"}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def tiny_bert(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=16, **sizes)
    ).eval()


def save(folder, model, **options):
    """Model, tokenizer and a card, as the scripts leave them."""
    model.save_pretrained(folder, **options)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: [hf_r2]\n---\n# tiny\n")
    return folder


def test_push_reload_and_revision(hub, tmp_path):
    first, second = save(tmp_path / "first", tiny_bert(0)), save(tmp_path / "second", tiny_bert(1))
    (first / "optimizer.pt").write_bytes(b"a pickle")
    (first / "checkpoint-5").mkdir()
    (first / "checkpoint-5" / "model.safetensors").write_bytes(b"not for the hub")
    worker = str(HERE / "workers" / "push_and_reload.py")
    ran = client([worker, "user/float", str(first), str(second), str(second)], hub, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    one, two, unchanged = answer["pushes"]
    assert [push["new_commits"] for push in answer["pushes"]] == [
        1,
        1,
        0,
    ]  # one a push; none for what is there already
    assert unchanged["sha"] == two["sha"] != one["sha"]
    assert one["url"] == f"{hub}/user/float/commit/{one['sha']}"
    assert all(push["same_by_id"] and push["same_by_revision"] for push in answer["pushes"])
    assert one["logits"] != two["logits"]
    assert answer["first_by_revision"] == one["logits"]  # the first commit still loads after the second
    expected = [".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert one["files"] == [*expected, "tokenizer_config.json"]


def test_packed_model_by_id(hub, tmp_path):
    packed = quantize(tiny_bert(0), R2QuantConfig(method="nearest", weight_bits=2))
    folder = save(tmp_path / "packed", packed)
    sharded = save(tmp_path / "sharded", packed, max_shard_size="2KB")
    worker = str(HERE / "workers" / "push_and_reload.py")
    ran = client([worker, "user/packed", str(folder), str(sharded)], hub, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    whole, shards = json.loads(ran.stdout)["pushes"]
    assert whole["same_by_id"] and whole["new_commits"] == 1
    with torch.no_grad():
        ids = torch.tensor([[VOCABULARY.index(word) for word in "what is the range of a weight".split()]])
        torch.testing.assert_close(torch.tensor(whole["logits"]), packed(ids).logits, rtol=0, atol=1e-6)
    # A model.safetensors left behind would be loaded in place of the shards: it goes in the same commit.
    assert "model.safetensors" not in shards["files"] and "model.safetensors.index.json" in shards["files"]
    assert shards["same_by_id"] and shards["new_commits"] == 1


BRANCH_THEN_LOG_OUT = """
import os, sys
from huggingface_hub import HfApi
from hf_r2.hub import push_folder
print(push_folder(sys.argv[1], "user/branches", revision="w2", private=True))
files = [len(HfApi().list_repo_files("user/branches", revision=name)) for name in ("main", "w2")]
print(files, HfApi().model_info("user/branches").private)
del os.environ["HF_TOKEN"]
try:
    push_folder(sys.argv[1], "user/nobody")
except PermissionError as error:
    print(error)
"""


def test_push_to_a_branch_and_without_a_token(hub, tmp_path):
    folder = save(tmp_path / "model", tiny_bert(0))
    ran = client(["-c", BRANCH_THEN_LOG_OUT, str(folder)], hub, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    url, files, refused = ran.stdout.splitlines()
    assert url.startswith(f"{hub}/user/branches/commit/")
    assert files == "[1, 6] True"  # main has only what creating put there
    assert refused.startswith(f"the Hub at {hub} refused to write 'user/nobody' (HTTP 401): log in with")


UNREACHABLE = """
import sys, time
from hf_r2.hub import push_folder
start = time.monotonic()
try:
    push_folder(sys.argv[1], "user/model")
except ConnectionError as error:
    print(error)
print(time.monotonic() - start < 10)
"""


def test_unreachable_hub_is_one_clear_line_at_once(tmp_path):
    folder = save(tmp_path / "model", tiny_bert(0))
    ran = client(["-c", UNREACHABLE, str(folder)], "http://127.0.0.1:9", tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    message, quick = ran.stdout.splitlines()
    assert message.startswith("cannot reach the Hub at http://127.0.0.1:9 (")
    assert message.endswith(f"then push again; the model is safe in {folder}")
    assert quick == "True"


@pytest.mark.parametrize("lost", ["config.json", "README.md", "model.safetensors"])
def test_incomplete_folder_is_refused_before_anything_is_sent(tmp_path, lost):
    for name in {"config.json", "README.md", "model.safetensors"} - {lost}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"it lacks {lost};"):
        push_folder(tmp_path, "user/model")


def test_missing_shard_and_missing_folder(tmp_path):
    for name in ("config.json", "README.md", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"it lacks model-00002-of-00002\.safetensors;"):
        push_folder(tmp_path, "user/model")
    with pytest.raises(ValueError, match="not a folder"):
        push_folder(tmp_path / "nothing", "user/model")
