"""scripts/measuring.py and what feeds it: rows that cannot be used are named by their place in the file, others counted."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from tests.models import float_model
from tests.test_imagenet_script import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
quantize, evaluation, cora_study, qnli_data, data_files, image_data = map(
    importlib.import_module, ["quantize", "evaluation", "cora_study", "qnli_data", "data_files", "image_data"]
)


def run(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    script.main()


@pytest.fixture
def images(tmp_path):
    float_model("resnet").save_pretrained(tmp_path / "model")
    parquet(tmp_path / "test.parquet", [0, 1] * 3)
    return [
        "--model_name_or_path", tmp_path / "model", "--calibration_file", tmp_path / "train.parquet",
        "--validation_file", tmp_path / "test.parquet", "--image_size", "32", "--output_dir", tmp_path / "out",
    ]  # fmt: skip


@pytest.mark.parametrize("script", [quantize, cora_study], ids=["quantize", "cora_study"])
def test_a_bad_image_is_named_by_its_row_in_the_file(tmp_path, monkeypatch, images, script):
    for bad in (7, 2):
        parquet(tmp_path / "train.parquet", [0, 1] * 5, bad=(bad,))
        with pytest.raises(SystemExit, match=rf"train\.parquet: row {bad} does not decode"):
            run(monkeypatch, script, *images, "--seed", "3")
    assert data_files.drawn(Dataset.from_dict({"x": range(10)}), 4, 3)[1] != [0, 1, 2, 3]


def test_the_rows_that_are_drawn_are_those_that_always_were():
    data = Dataset.from_dict({"x": [f"row {i}" for i in range(20)]})
    drawn, rows = data_files.drawn(data, 6, 5)
    assert drawn["x"][:] == data.shuffle(seed=5)["x"][:6] == [f"row {i}" for i in rows]
    assert len(data_files.drawn(data, 50, 5)[1]) == 20


def test_images_that_are_skipped_and_samples_that_are_missing_are_counted(tmp_path, monkeypatch, images, capsys):
    parquet(tmp_path / "train.parquet", [0, 1] * 5, bad=(7, 2))
    parquet(tmp_path / "test.parquet", [0, 1] * 3, bad=(5,))
    flags = [*images, "--bad_images", "skip", "--max_eval_samples", "20"]
    run(monkeypatch, quantize, *flags, "--methods", "nearest", "--widths", "W4A8")
    (row,) = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert row["bad_images"] == {"calibration": 2, "validation": 1}
    said = capsys.readouterr().out
    assert "8 samples, fewer than the 1024 of --calibration_samples" in said
    assert "5 samples, fewer than the 20 of --max_eval_samples" in said
    del flags[2:4]
    run(monkeypatch, evaluation, *flags, "--output_dir", tmp_path / "other")
    (row,) = json.loads((tmp_path / "other/metrics.json").read_text())["results"]
    assert row["bad_images"] == 1 and row["samples"] == 5


@pytest.mark.parametrize("labels", [None, [7] * 4, ["x"] * 4], ids=["none", "outside the head", "texts"])
def test_labels_of_calibration_images_are_not_looked_at(tmp_path, monkeypatch, images, labels):
    rows = Dataset.from_parquet(parquet(tmp_path / "labelled.parquet", [0, 1, 1, 0]))
    other = rows.remove_columns("label")
    other = other if labels is None else other.add_column("label", labels)
    found = []
    for data in (rows, other):
        data.to_parquet(str(tmp_path / "train.parquet"))
        run(
            monkeypatch,
            quantize,
            *images,
            "--methods",
            "nearest",
            "--widths",
            "W4A8",
            "--save_dir",
            tmp_path / "packed",
        )
        found.append(load_file(tmp_path / "packed/nearest-W4A8-per_channel/model.safetensors"))
        (tmp_path / "out/metrics.json").unlink()
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_columns_without_images_end_with_one_line(tmp_path, monkeypatch, images):
    Dataset.from_dict({"picture": [1]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(SystemExit, match=r"train\.parquet: no column image; needed are image, found picture"):
        run(monkeypatch, quantize, *images)
    Dataset.from_dict({"image": [1], "label": [0]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(SystemExit, match=r"train\.parquet: column image must hold images, got Value"):
        run(monkeypatch, quantize, *images)


def test_heads_too_small_for_the_data_are_told_flags_that_there_are(tmp_path):
    from datasets import ClassLabel

    rows = Dataset.from_parquet(parquet(tmp_path / "some.parquet", [0, 1])).cast_column("label", ClassLabel(4))
    with pytest.raises(SystemExit, match=r"some: 4 classes, but the head has 2$"):
        image_data.check_labels(rows, 2, "some")
    with pytest.raises(SystemExit, match="but the head has 2; --new_head makes one that fits"):
        image_data.check_labels(rows, 2, "some", advice="; --new_head makes one that fits")


def test_texts_for_calibration_need_no_label_and_are_named_by_their_row(tmp_path, monkeypatch):
    tokenizer = qnli_data.generated_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = qnli_data.generated_data(12, 8)
    data["validation"].to_csv(str(tmp_path / "test.csv"))
    flags = ["--model_name_or_path", tmp_path / "model", "--task", "text-classification", "--methods", "nearest"]
    flags += ["--validation_file", tmp_path / "test.csv", "--widths", "W4A8", "--output_dir", tmp_path / "out"]
    flags += ["--calibration_file", tmp_path / "train.csv"]
    data["train"].remove_columns("label").to_csv(str(tmp_path / "train.csv"))
    run(monkeypatch, quantize, *flags)
    (row,) = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert 0 <= row["accuracy"] <= 1
    rows = [row if i != 9 else {**row, "question": None} for i, row in enumerate(data["train"])]
    Dataset.from_list(rows).to_csv(str(tmp_path / "train.csv"))
    with pytest.raises(SystemExit, match=r"train\.csv: question is empty in row 9 \(the first is row 0\)"):
        run(monkeypatch, quantize, *flags)
