"""scripts/export.py: what it leaves open, what it says, and one line where something is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_r2 import R2QuantConfig, quantize
from tests.models import float_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import export as script  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed BERT."""
    place = tmp_path_factory.mktemp("packed")
    quantize(float_model("bert"), R2QuantConfig(weight_bits=4)).save_pretrained(place)
    return place


def run(folder, output, *more):
    """The script's result in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    line = ["--model_name_or_path", str(folder), "--output", str(output), "--length", "7", *more]
    command = [sys.executable, "scripts/export.py", *line]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("form", "package", "extra"), [("onnx", "onnxruntime", "onnx"), ("coreml", "coremltools", "coreml")]
)
def test_a_missing_package_is_one_line(folder, tmp_path, monkeypatch, form, package, extra):
    find = importlib.util.find_spec
    exporter = importlib.import_module(f"hf_r2.export.{form}")
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == package else find(name))
    words = [
        "export.py",
        "--model_name_or_path",
        str(folder),
        "--output",
        str(tmp_path / "a.mlpackage"),
        "--format",
        form,
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        script.main()
    message = str(ended.value)
    assert "\n" not in message and package in message and f"pip install '.[{extra}]'" in message


def test_open_axes_from_one_sample_a_folder_that_was_missing_and_a_seam_file_of_no_use(folder, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra hf_r2[onnx]")
    import onnxruntime

    output = tmp_path / "new" / "model.onnx"
    done = run(folder, output, "--dynamic", "--seam_file", "images.parquet")
    assert done.returncode == 0, done.stderr
    assert "no seams were placed" in json.loads(output.with_name("model.onnx.json").read_text())["notes"][-1]
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(output)) and "times the size of float16" in lines[0]
    assert "no seams were placed" in lines[-1] and "[torch.onnx]" not in done.stdout
    assert "torchvision" not in done.stderr and "experimental" not in done.stderr
    ids = torch.randint(3, 40, (3, 5))
    feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    found = torch.from_numpy(onnxruntime.InferenceSession(str(output)).run(["logits"], feeds)[0])
    with torch.no_grad():
        ours = script.load(str(folder))(input_ids=ids).logits
    assert found.shape == ours.shape and (found - ours).abs().max() < 1e-3 * ours.abs().max()


def test_sizes_in_words():
    assert script.smaller(50, 100) == "2.00 times smaller than float16"
    assert script.smaller(100, 100) == "1.00 times smaller than float16"
    assert script.smaller(100, 40) == "2.50 times the size of float16"
