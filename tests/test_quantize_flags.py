"""scripts/quantize.py: flags that are refused before anything is loaded, Ctrl-C, and going on within a cell."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from hf_r2 import R2QuantConfig, quantize
from tests.models import float_model
from tests.test_quantize_script import pictures

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
script, interrupts, adaround = map(importlib.import_module, ["quantize", "interrupts", "hf_r2.ptq.adaround"])
NOWHERE = ("--model_name_or_path", "gone", "--calibration_file", "gone.parquet", "--validation_file", "gone.parquet")


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, flags)])
    script.main()


@pytest.fixture
def files(tmp_path):
    float_model("resnet").save_pretrained(tmp_path / "model")
    pictures(tmp_path / "some.parquet", 6)
    return [
        "--model_name_or_path", tmp_path / "model", "--calibration_file", tmp_path / "some.parquet",
        "--validation_file", tmp_path / "some.parquet", "--image_size", "32", "--output_dir", tmp_path / "out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--options", '{"adaround": {"itres": 3}}', "--methods", "adaround"],
            "'adaround' has no option itres; its op",
        ),
        (["--options", '{"adaruond": {}}'], "there is no 'adaruond'; there are: nearest, mse, .*adaround"),
        (["--options", '{"adaround": {'], "options must be JSON, like .*: Expecting property name"),
        (["--options", "[1]"], "options must be a JSON object, like .*, got '\\[1\\]'"),
        (["--options", '{"mse": 3}', "--methods", "mse"], "options of 'mse' must be a JSON object, .*got 3"),
        (["--methods", "nearest", "adaruond"], "no method called 'adaruond'; there are: nearest"),
        (["--granularities", "per_row"], "granularity must be one of per_tensor, per_channel; got 'per_row'"),
        (["--first_last_bits", "9"], "first_last_bits must be an integer from 1 to 8, got 9"),
        (["--widths", "W9A8"], "widths are written W4A8 .*, got 'W9A8'"),
        (["--width", "W4A8", "--metod", "mse"], "not used .*--metod"),
        (["--calibration_samples", "0"], "calibration_samples must be 1 or more, got 0"),
        (["--max_eval_samples", "-1"], "max_eval_samples must be 1 or more, got -1"),
    ],
)
def test_flags_that_make_no_recipe_end_with_one_line_before_anything_is_loaded(monkeypatch, flags, said):
    with pytest.raises(SystemExit, match=f"^quantize: .*{said}") as ended:
        run(monkeypatch, *NOWHERE, *flags)
    assert "\n" not in str(ended.value)


def test_a_packed_model_is_refused_before_images_are_read(tmp_path, monkeypatch, files):
    quantize(float_model("resnet"), R2QuantConfig()).save_pretrained(tmp_path / "packed")
    files[1], files[3] = tmp_path / "packed", "gone.parquet"
    with pytest.raises(SystemExit, match="packed is quantized already: give the float model"):
        run(monkeypatch, *files)


def test_ctrl_c_keeps_cells_and_layers(tmp_path, monkeypatch, files):
    flags = [*files, "--methods", "nearest", "adaround", "--widths", "W4A8", "--options", '{"adaround": {"iters": 3}}']
    run(monkeypatch, *flags, "--save_dir", tmp_path / "whole", "--output_dir", tmp_path / "other")
    learn, learned = adaround._round_layer_, []

    def stop_at_the_third(*args):
        learned.append(args[3].name)
        if len(learned) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        learn(*args)

    monkeypatch.setattr(adaround, "_round_layer_", stop_at_the_third)
    with pytest.raises(interrupts.Stopped, match=r"finished cells are in .*metrics\.json.*: the same command goes on"):
        run(monkeypatch, *flags)
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["nearest"]
    (notes,) = (tmp_path / "out/unfinished").iterdir()
    assert notes.name.startswith("adaround-W4A8-per_channel-") and len(list(notes.glob("*.safetensors"))) == 2
    problems = []
    problem = adaround.layer_problem
    monkeypatch.setattr(adaround, "layer_problem", lambda *a: problems.append(a) or problem(*a))
    run(monkeypatch, *flags, "--save_dir", tmp_path / "part")
    again = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert again[:1] == rows and again[1]["resumed"] and "resumed" not in again[0]
    assert len(problems) == 5 and not (tmp_path / "out/unfinished").exists()
    load = script.measuring.AUTO["image-classification"].from_pretrained
    whole, part = (load(tmp_path / name / "adaround-W4A8-per_channel").state_dict() for name in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_notes_of_other_settings_have_another_folder():
    args = script.QuantizeArguments("model", "a", "b", methods=["adaround", "mse"], widths=["W4A8"])
    slow, fast = script.cells(args)
    assert script.unfinished(fast, args) is None
    found = {script.unfinished(slow, args)}
    for change in (
        {"symmetric": True},
        {"seed": 1},
        {"first_last_bits": 8},
        {"options": '{"adaround": {"iters": 1}}'},
    ):
        other = script.QuantizeArguments("model", "a", "b", methods=["adaround"], widths=["W4A8"], **change)
        found.add(script.unfinished(script.cells(other)[0], other))
    assert len(found) == 5
