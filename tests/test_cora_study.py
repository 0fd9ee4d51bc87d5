"""The comparison of scripts/cora_study.py and its pictures."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hf_r2 import plots
from tests.models import float_model
from tests.test_quantize_script import pictures

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
script = importlib.import_module("cora_study")
LAYER = {"name": "conv", "rank": 2, "cutoff": 2.0, "cost": 10, "singular_values": [4.0, 3.0, 2.0, 1.0]}


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_ranks(tmp_path, drawn):
    other = {**LAYER, "name": "fc", "rank": 5}
    plots.plot_ranks({"equal": {"layers": [LAYER]}, "searched": {"layers": [LAYER, other]}}, tmp_path / "ranks.png")
    lines = drawn[0].axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[2, 0], [2, 5]]
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["equal, 20 numbers", "searched, 70 numbers"]
    with pytest.raises(ValueError, match="traces must hold at least one run with at least one layer, got none"):
        plots.plot_ranks({}, tmp_path / "ranks.png")


def test_singular_values(tmp_path, drawn):
    plots.plot_singular_values(LAYER, tmp_path / "values.png")
    axes = drawn[0].axes[0]
    assert list(axes.lines[0].get_ydata()) == [4.0, 3.0, 2.0, 1.0]
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == [[2.0, 2.0], [2, 2]]  # the cut-off, the rank
    passed = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert passed == pytest.approx(4.0, rel=1e-4)  # the first component, at a quarter of the cut-off, passes
    plots.plot_singular_values({**LAYER, "cutoff": None}, tmp_path / "values.png")
    assert len(drawn[1].axes[0].lines) == 2 and not drawn[1].axes[0].collections
    with pytest.raises(ValueError, match="layer 'conv' has no singular values"):
        plots.plot_singular_values({**LAYER, "singular_values": []}, tmp_path / "values.png")


def test_options_that_make_no_recipe_end_with_one_line(monkeypatch):
    files = ["--model_name_or_path", "gone", "--calibration_file", "gone", "--validation_file", "gone"]
    for flags, said in (
        (["--cora", '{"budjet": 1}'], "'cora' has no option budjet"),
        (["--cora", "{"], "cora must be JSON"),
        (["--adaround", "[]"], "adaround must be a JSON object"),
        (["--widths", "9"], "weight_bits must be an integer from 1 to 8, got 9"),
        (["--max_eval_samples", "0"], "max_eval_samples must be 1 or more, got 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["cora_study.py", *files, *flags])
        with pytest.raises(SystemExit, match=f"^cora_study: .*{said}"):
            script.main()


def test_the_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    float_model("resnet").save_pretrained(tmp_path / "model")
    pictures(tmp_path / "train.parquet", 6)
    pictures(tmp_path / "test.parquet", 10)
    flags = [
        "cora_study.py", "--model_name_or_path", str(tmp_path / "model"), "--calibration_file", str(tmp_path / "train.parquet"),
        "--validation_file", str(tmp_path / "test.parquet"), "--image_size", "32", "--output_dir", str(tmp_path / "out"),
        "--budget", "0.2", "--cora", '{"iters": 2}', "--widths", "3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", flags)
    script.main()
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    names = ["squant", "squant, biases only", "squant, equal ranks", "squant, searched ranks"]
    assert [row["name"] for row in first["results"]] == names
    bits = [row["bits_per_weight"] for row in first["results"]]
    assert bits[0] == bits[1] and bits[0] + 0.7 < bits[3] and abs(bits[2] - bits[3]) < 0.5
    assert [row.get("iterations") for row in first["results"]] == [None, 0, 0, 2]
    assert sum(first["results"][3]["ranks"]) > 0 and not any(first["results"][1]["ranks"])
    monkeypatch.setattr(sys, "argv", [*flags, "--adaround", '{"iters": 2}'])
    script.main()
    second = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert second["results"][:4] == first["results"]
    assert second["results"][4]["name"] == "adaround" and second["results"][4]["iterations"] == 2 * 7
    assert {"accuracy.png", "ranks-W3 squant.png", "metrics.json"} <= {f.name for f in (tmp_path / "out").iterdir()}
    assert "| W3 | adaround |" in capsys.readouterr().out
