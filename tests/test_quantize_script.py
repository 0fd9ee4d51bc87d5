"""scripts/quantize.py: a small table, carried on where it was stopped; and what it does not take."""

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageClassification

from tests.models import float_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
script = importlib.import_module("quantize")
images = importlib.import_module("images")
measuring = importlib.import_module("measuring")
Image = pytest.importorskip("PIL.Image")


def run_script(*flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "scripts/quantize.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def pictures(file, count):
    g = torch.Generator().manual_seed(count)
    rows = []
    for _ in range(count):
        stream = io.BytesIO()
        pixels = torch.randint(0, 256, (40, 34, 3), generator=g, dtype=torch.uint8)
        Image.frombytes("RGB", (34, 40), bytes(pixels.flatten().tolist())).save(stream, "PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    from datasets import Features, Value
    from datasets import Image as Pictures

    features = Features({"image": Pictures(), "label": Value("int64")})
    Dataset.from_dict({"image": rows, "label": [i % 2 for i in range(count)]}, features=features).to_parquet(str(file))


def test_a_table_and_going_on_with_it(tmp_path):
    float_model("resnet").save_pretrained(tmp_path / "model")
    pictures(tmp_path / "train.parquet", 6)
    pictures(tmp_path / "test.parquet", 10)
    flags = [
        "--model_name_or_path", str(tmp_path / "model"), "--calibration_file", str(tmp_path / "train.parquet"),
        "--validation_file", str(tmp_path / "test.parquet"), "--image_size", "32", "--output_dir", str(tmp_path / "out"),
        "--calibration_batch", "3", "--save_dir", str(tmp_path / "packed"),
    ]  # fmt: skip
    first = run_script(
        *flags,
        "--methods",
        "nearest",
        "adaround",
        "--widths",
        "W8A32",
        "W4A8",
        "--options",
        '{"adaround": {"iters": 2}}',
    )
    assert first.returncode == 0, first.stderr
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    rows = {(row["method"], row["width"]): row for row in content["results"]}
    assert set(rows) == {(m, w) for m in ("nearest", "adaround") for w in ("W8A32", "W4A8")}
    assert all(row["time_s"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows.values())
    assert rows["nearest", "W4A8"]["bits_per_weight"] > 4 and "like the rest" in rows["nearest", "W4A8"]["policy"]
    assert content["command"].startswith("python scripts/quantize.py") and 0 <= content["float_accuracy"] <= 1
    assert all(row["eval_s"] > 0 for row in rows.values())
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "packed/nearest-W4A8-per_channel").eval()
    test = images.Pictures(load_dataset("parquet", data_files=str(tmp_path / "test.parquet"))["train"], 32, "", "test")
    assert measuring.accuracy(saved, test.batches(50), test.labels) == rows["nearest", "W4A8"]["accuracy"]
    cell = f"{rows['nearest', 'W4A8']['bits_per_weight']:.2f} b, "
    assert cell in next(line for line in first.stdout.splitlines() if line.startswith("| nearest |"))
    assert "| adaround |" in first.stdout and "| per_channel | W8A32 | W4A8 |" in first.stdout
    second = run_script(
        *flags,
        "--methods",
        "nearest",
        "requant",
        "--widths",
        "W4A8",
        "W2A32",
        "--granularities",
        "per_channel",
        "per_tensor",
    )
    assert second.returncode == 0, second.stderr
    again = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert again[: len(content["results"])] == content["results"]  # what was there is not measured again
    assert len(again) == len(content["results"]) + 7


def test_cells_of_another_run_are_not_taken_over():
    args = script.QuantizeArguments("model", "a", "b")
    content = {"basis": script.basis(args), "results": [{"method": "nearest"}]}
    more = script.QuantizeArguments("model", "a", "b", methods=["dfq"], widths=["W2A2"])
    assert script.measured_before(content, more) == content["results"]
    for change in ({"calibration_batch": 2}, {"seed": 1}, {"symmetric": True}, {"image_size": 32}):
        assert script.measured_before(content, script.QuantizeArguments("model", "a", "b", **change)) == []
    assert script.measured_before({}, args) == []


def test_a_cell_that_is_refused_is_kept_with_its_reason():
    cell = {
        "method": "requant", "width": "W4A32", "weight_bits": 4, "act_bits": None, "granularity": "per_channel",
        "symmetric": False, "options": {}, "first_last_bits": None,
    }  # fmt: skip
    data = type("Data", (), {"calibration": [{"pixel_values": torch.randn(2, 3, 16, 16)}]})()
    row = script.run(cell, float_model("resnet"), data)
    assert "requant searches symmetric ranges" in row["error"]
    assert script.text(row) == "refused" and script.text(None) == "-"
    assert script.same(row, cell) and not script.same(row, {**cell, "weight_bits": 3})


@pytest.mark.parametrize("width", ["4A8", "W9A8", "W4A1", "W4"])
def test_widths_that_cannot_be_read(width):
    args = script.QuantizeArguments("model", "a", "b", widths=[width])
    with pytest.raises(ValueError, match="widths are written W4A8 or W4A32"):
        script.cells(args)


def test_images_are_cut_from_the_middle():
    pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
    pixels[4:36, 14:46] = 200
    picture = Image.frombytes("RGB", (60, 40), bytes(pixels.flatten().tolist()))
    assert images.square(picture, 32).eq(200).all()
    assert images.square(picture, 80).shape == (3, 80, 80)  # scaled up where it is too small
