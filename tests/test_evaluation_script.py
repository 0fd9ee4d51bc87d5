"""scripts/evaluation.py: float and packed checkpoints of the tracks give their row, in one file; and what it does not take."""

import importlib
import json
import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification

from hf_r2 import R2QuantConfig, quantize
from tests.models import float_model
from tests.test_imagenet_script import run_script
from tests.test_quantize_script import pictures

pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")
script, measuring, images, translation, vocabulary, tracks = map(
    importlib.import_module, ["evaluation", "measuring", "images", "translation", "vocabulary", "tracks"]
)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, flags)])
    script.main()


def test_float_and_packed_rows_stand_in_one_file(tmp_path, monkeypatch, capsys):
    model = float_model("resnet")
    model.save_pretrained(tmp_path / "float")
    quantize(model, R2QuantConfig("nearest", 4, "per_tensor")).save_pretrained(tmp_path / "packed")
    pictures(tmp_path / "test.parquet", 10)
    flags = ["--validation_file", tmp_path / "test.parquet", "--image_size", 32, "--output_dir", tmp_path / "out"]
    for name in ("float", "packed", "packed"):
        run(monkeypatch, "--model_name_or_path", tmp_path / name, *flags)
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert [(row["name"], row["weight_bits"], row["method"]) for row in rows] == [
        ("float", None, None),
        ("packed", 4, "nearest"),
    ]
    assert all(row["samples"] == 10 and row["made_by"]["command"] for row in rows)
    assert 4 < rows[1]["bits_per_weight"] < 5 and rows[0]["bits_per_weight"] == 32
    test = images.Pictures(Dataset.from_parquet(str(tmp_path / "test.parquet")), 32, "", "test")
    for row in rows:
        saved = AutoModelForImageClassification.from_pretrained(tmp_path / row["name"])
        assert measuring.accuracy(saved, test.batches(3), test.labels) == row["accuracy"]
    assert f"| packed | {100 * rows[1]['accuracy']:.2f} |" in capsys.readouterr().out
    run(monkeypatch, "--model_name_or_path", tmp_path / "packed", *flags, "--max_eval_samples", 4)
    again = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert again[:2] == rows and again[2]["samples"] == 4  # other settings are another row


def test_a_packed_translator_gives_bleu(tmp_path, monkeypatch):
    rows = {"en": ["one two", "two three one", "three"], "de": ["eins zwei", "zwei drei eins", "drei"]}
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "test.parquet"))
    tokenizer = vocabulary.train([*rows["en"], *rows["de"]], 24, tmp_path / "words")
    args = translation.TranslationArguments(d_model=16, layers=1, heads=2, ffn_dim=16)
    torch.manual_seed(0)
    packed = quantize(translation.load_model(args, tokenizer), R2QuantConfig("nearest", 3, "per_tensor"))
    tracks.save(packed, tokenizer, tmp_path / "packed")
    flags = ["--validation_file", tmp_path / "test.parquet", "--task", "translation", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "--model_name_or_path", tmp_path / "packed", *flags, "--num_beams", 2)
    (row,) = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert row["weight_bits"] == 3 and 0 <= row["bleu"] <= 100 and row["signature"].startswith("nrefs:1|")
    assert "accuracy" not in row


def test_labels_and_columns_that_do_not_fit_end_with_one_line(tmp_path, monkeypatch):
    float_model("resnet").save_pretrained(tmp_path / "float")
    Dataset.from_dict({"picture": [1], "label": [0]}).to_parquet(str(tmp_path / "a.parquet"))
    flags = ["--model_name_or_path", tmp_path / "float", "--output_dir", tmp_path]
    with pytest.raises(
        SystemExit, match=r"a\.parquet: no column image; needed are image, label, found picture, label"
    ):
        run(monkeypatch, *flags, "--validation_file", tmp_path / "a.parquet")
    Dataset.from_dict({"image": [1], "label": [7]}).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(
        SystemExit, match=r"b\.parquet: labels must be whole numbers from 0 to 1 for this head, found 7"
    ):
        run(monkeypatch, *flags, "--validation_file", tmp_path / "b.parquet")


def test_an_unreachable_hub_ends_soon_with_one_line(tmp_path):
    float_model("resnet").save_pretrained(tmp_path / "float")
    flags = ["--model_name_or_path", str(tmp_path / "float"), "--validation_file", "some/pictures:test"]
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    run = run_script(*flags, "--output_dir", str(tmp_path / "out"), script="evaluation", **hub)
    assert run.returncode == 1 and "Give a local file in place of some/pictures:test" in run.stderr
    assert "Traceback" not in run.stderr and "Retrying" not in run.stderr
