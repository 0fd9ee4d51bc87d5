"""scripts/qnli.py: the data it takes, the errors it gives, and one short run of the whole road."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_r2  # noqa: F401  (registers the quantizer with transformers)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
qnli_data = importlib.import_module("qnli_data")
data_files = importlib.import_module("data_files")
common = importlib.import_module("common")

PAIRS = {
    "question": ["who built it ?", 'what is "it" ?'],
    "sentence": ["anna built it .", 'an open " mark , and a comma'],
    "label": [0, 1],
}


def run_script(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "scripts/qnli.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


def holds_the_answer(question: str, sentence: str) -> bool:
    """The rule of the generated data, read off the text alone."""
    words = re.split(r"\b(?:built|painted|bought|sold|designed|repaired)\b", sentence)
    subject, rest = words[0].split()[-1], words[1].split()
    return {
        "who": subject != "they",
        "how": rest[0] != "the",
        "where": any(word in qnli_data.PLACES for word in rest),
        "when": any(word.isdigit() for word in rest),
        "why": "for" in rest,
    }[question.split()[0]]


def test_a_generated_label_says_whether_the_sentence_holds_the_answer():
    rng = random.Random(7)
    pairs = [qnli_data.generated_pair(rng) for _ in range(500)]
    assert [pair["label"] for pair in pairs] == [1 - holds_the_answer(p["question"], p["sentence"]) for p in pairs]


def test_generated_data_is_reproducible_balanced_and_keeps_its_parts_apart():
    data, again = qnli_data.generated_data(400, 100, seed=3), qnli_data.generated_data(400, 100, seed=3)
    assert data["train"].to_list() == again["train"].to_list()
    assert data["train"].to_list() != qnli_data.generated_data(400, 100, seed=4)["train"].to_list()
    keys = {part: {(r["question"], r["sentence"]) for r in data[part]} for part in data}
    assert not keys["train"] & keys["validation"]
    assert 150 < sum(data["train"]["label"]) < 250


def test_the_generated_vocabulary_knows_every_word():
    tokenizer, rng = qnli_data.generated_tokenizer(), random.Random(1)
    pairs = [qnli_data.generated_pair(rng) for _ in range(300)]
    ids = tokenizer([p["question"] for p in pairs], [p["sentence"] for p in pairs])["input_ids"]
    assert all(tokenizer.unk_token_id not in row and len(row) <= 32 for row in ids)


@pytest.mark.parametrize("suffix", sorted(data_files.READERS))
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    file = tmp_path / f"pairs{suffix}"
    if suffix == ".tsv":  # as GLUE writes it: an index, bare quotation marks, names of classes
        rows = zip(PAIRS["question"], PAIRS["sentence"], ["entailment", "not_entailment"], strict=True)
        lines = ["index\tquestion\tsentence\tlabel", *(f"{i}\t" + "\t".join(row) for i, row in enumerate(rows))]
        file.write_text("\n".join(lines) + "\n")
    else:
        data = Dataset.from_dict(PAIRS)
        {".parquet": data.to_parquet, ".csv": data.to_csv}.get(suffix, data.to_json)(str(file))
    data = qnli_data.from_files(str(file), str(file))
    assert data["train"].to_dict() == PAIRS == data["validation"].to_dict()


@pytest.mark.parametrize(
    "content, message",
    [
        ("premise,label\na,0\n", "no column question, sentence; needed are question, sentence, label, found premise"),
        ("question,sentence,label\na,b,-1\n", "label must be 0 or 1, or entailment or not_entailment; found -1"),
        ("question,sentence,label\na,b,maybe\n", "found 'maybe'"),
        (
            "question,sentence,label\na,b,0\n,b,1\na,b,0\n,d,0\n",
            "question is empty in row 1, 3 (the first is row 0)",
        ),
        ("question,sentence,label\na,NA,0\n", "sentence is empty in row 0"),
        ("question,sentence,label\na,b,\na,b,1\n", "label is empty in row 0"),
        ("question,sentence,label\n3,b,1\n", "question must hold text, got int64"),
        ("question,sentence,label\n", "cannot be read as csv, or holds no row"),
    ],
)
def test_a_file_that_cannot_be_used_ends_with_one_line(tmp_path, content, message):
    file = tmp_path / "pairs.csv"
    file.write_text(content)
    with pytest.raises(SystemExit, match=re.escape(message)):
        qnli_data.from_files(str(file), str(file))


@pytest.mark.parametrize("name, message", [("gone.csv", "there is no such file"), ("pairs.xls", "the file type must")])
def test_a_missing_or_unknown_file_is_named(tmp_path, name, message):
    with pytest.raises(SystemExit, match=f"{name}: {message}"):
        qnli_data.from_files(str(tmp_path / name), str(tmp_path / name))


def test_validation_rows_are_sorted_by_length_and_training_rows_are_not():
    tokenizer, data = qnli_data.generated_tokenizer(), qnli_data.generated_data(50, 50)
    lengths = {
        by_length: [
            len(r) for r in qnli_data.tokenized(data["train"], tokenizer, 32, by_length=by_length)["input_ids"]
        ]
        for by_length in (True, False)
    }
    assert lengths[True] == sorted(lengths[False]) != lengths[False]
    cut = qnli_data.tokenized(data["train"], tokenizer, 10, by_length=False)
    assert max(map(len, cut["input_ids"])) == 10


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "run" / "metrics.json"
    common.write_json(file, {"accuracy": 0.5})
    with pytest.raises(ValueError):  # NaN is no JSON; the old file stays
        common.write_json(file, {"accuracy": float("nan")})
    assert json.loads(file.read_text()) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--weight_bits", "9"], "weight_bits must be an integer from 1 to 8, got 9"),
        (["--train_file", "a.csv"], "give both or neither"),
        (["--generated", "--range_weight", "-1"], "range_weight must be a number >= 0, got -1.0"),
    ],
)
def test_a_flag_that_is_not_allowed_ends_with_one_line(flags, message):
    run = run_script(*flags)
    assert run.returncode == 1 and message in run.stderr and "Traceback" not in run.stderr


def test_an_unreachable_hub_ends_soon_with_one_line(tmp_path):
    run = run_script(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert run.returncode == 1 and "Give a local folder with --model_name_or_path" in run.stderr
    assert "Traceback" not in run.stderr and "Retrying" not in run.stderr


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Four steps of training, one width of each kind; returns the output folder and what was printed."""
    out = tmp_path_factory.mktemp("qnli") / "run"
    flags = ["--max_train_samples", "256", "--max_eval_samples", "100", "--num_train_epochs", "1", "--save_steps", "2"]
    flags += ["--weight_bits", "4", "--dkm_bits", "2", "--dkm_steps", "2", "--seed", "5"]
    run = run_script("--generated", *flags, "--output_dir", str(out))
    assert run.returncode == 0, run.stderr[-3000:]
    return out, run.stdout


def test_metrics_hold_what_made_the_run_and_every_number(short_run):
    out, printed = short_run
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"arguments", "versions", "seed", "commit", "command", "task", "results", "time_s", "ranges"} <= set(
        metrics
    )
    assert metrics["seed"] == 5 and metrics["arguments"]["qnli"]["weight_bits"] == [4]
    assert metrics["command"].startswith("python scripts/qnli.py --generated")
    assert [row["name"] for row in metrics["results"]] == ["float", "nearest-4bit", "dkm-2bit"]
    assert common.table(metrics["results"]) in printed
    assert [entry["step"] for entry in metrics["log"]][-1] == 4


@pytest.mark.parametrize("name", ["nearest-4bit", "dkm-2bit"])
def test_a_saved_model_reaches_the_accuracy_that_was_written_down(short_run, name):
    out, _ = short_run
    rows = {row["name"]: row for row in json.loads((out / "metrics.json").read_text())["results"]}
    model = AutoModelForSequenceClassification.from_pretrained(out / name)
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    data = data_files.subset(qnli_data.generated_data()["validation"], 100, seed=5)
    batch = tokenizer(list(data["question"]), list(data["sentence"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        hits = model(**batch).logits.argmax(-1) == torch.tensor(list(data["label"]))
    assert hits.float().mean().item() == pytest.approx(rows[name]["accuracy"])
    assert f"| **{name}** |" in (out / name / "README.md").read_text()


def test_plots_checkpoints_and_the_next_lines_are_there(short_run):
    out, printed = short_run
    plots = [out / "accuracy.png", out / "ranges.png", out / "nearest-4bit" / "weights.png"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert (out / "checkpoint-2" / "trainer_state.json").is_file()  # what --resume_from_checkpoint goes on from
    assert printed.rstrip().splitlines()[-3:-1] == ["import hf_r2", "from transformers import pipeline"]
