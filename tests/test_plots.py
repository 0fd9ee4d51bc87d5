"""The plots draw the numbers they are given, need no display, and refuse what cannot be drawn."""

import sys

import pytest
import torch
from matplotlib.figure import Figure

from hf_r2 import plots

ROW = {"method": "nearest", "weight_bits": 2, "act_bits": None, "granularity": "per_tensor", "range_loss": None}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to read what was drawn."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_weights_before_and_after(tmp_path, drawn):
    before = torch.tensor([-1.0, -0.9, 0.1, 1.0])
    plots.plot_weights(before, torch.tensor([-1.0, -1.0, 0.0, 1.0]), tmp_path / "new" / "w.png", "layer.0")
    assert (tmp_path / "new" / "w.png").read_bytes().startswith(PNG)
    axes, levels = drawn[0].axes
    assert axes.get_title() == "Weights of layer.0" and axes.get_xlabel() == "weight"
    assert axes.patches[0].get_data().values.sum() == pytest.approx(100)  # percent of all weights
    stems = [(segment[1][0], segment[1][1]) for segment in levels.collections[0].get_segments()]
    assert stems == [(-1.0, 50.0), (0.0, 25.0), (1.0, 25.0)]  # two of four weights at -1
    assert legend(drawn[0]) == ["float, range 2", "quantized, 3 levels"]


def test_many_levels_become_a_histogram(tmp_path, drawn):
    w = torch.randn(30, 40)
    plots.plot_weights(w, w * 0.99, tmp_path / "w.png", "rows with their own scale")
    assert legend(drawn[0])[1] == "quantized, 1200 values over all channels"
    assert drawn[0].axes[1].patches[0].get_data().values.sum() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_weight_can_be_drawn(tmp_path, drawn, dtype):
    w = torch.full((4, 4), 0.5, dtype=dtype, requires_grad=True)
    plots.plot_weights(w, w, tmp_path / "w.png", "constant")
    assert legend(drawn[0]) == ["float, range 0", "quantized, 1 level"]


def test_ranges_as_boxes(tmp_path, drawn):
    layers = [{"name": str(i), "range": 2.0 * i, "std": 0.5} for i in (1, 2, 4)]  # range / std = 4, 8, 16
    constant = {"name": "constant", "range": 0.0, "std": 0.0}
    plots.plot_ranges({"off": layers, "on": [layers[0], constant]}, tmp_path / "r.png")
    (axes,) = drawn[0].axes
    dots = [collection.get_offsets()[:, 1].tolist() for collection in axes.collections]
    assert dots == [[4.0, 8.0, 16.0], [4.0]]
    medians = [
        line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1 and line.get_linewidth() == 1.5
    ]
    assert medians == [8.0, 4.0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["off\n3 layers", "on\n1 layer"]
    assert axes.get_ylabel() == "range / std of a layer's weight"


def test_accuracy_has_a_line_for_each_method_and_run(tmp_path, drawn):
    rows = [
        {**ROW, "weight_bits": 4, "bits_per_weight": 4.1, "accuracy": 0.875},
        {**ROW, "bits_per_weight": 2.1, "accuracy": 0.5},
        {**ROW, "bits_per_weight": 2.1, "accuracy": 0.75, "range_loss": "margin", "act_bits": 8},
        {**ROW, "weight_bits": None, "granularity": None, "bits_per_weight": 32.0, "accuracy": 0.9},
    ]
    plots.plot_accuracy(rows, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert legend(drawn[0]) == [
        "nearest, per tensor, no range loss",
        "nearest, per tensor, A8, margin range loss",
        "float, no range loss",
    ]
    lines = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines]
    assert lines[:2] == [[(2.1, 50.0), (4.1, 87.5)], [(2.1, 75.0)]]  # by bits, in percent
    assert set(axes.lines[2].get_ydata()) == {90.0}
    assert axes.get_ylabel() == "accuracy (%)" and axes.get_xscale() == "log"
    assert axes.get_xlim()[1] < 5  # the float line needs no room at 32 bits


def test_other_metrics_keep_their_unit(tmp_path, drawn):
    plots.plot_accuracy([{**ROW, "bits_per_weight": 2.1, "bleu": 27.5}], tmp_path / "a.png", metric="bleu")
    assert drawn[0].axes[0].lines[0].get_ydata()[0] == 27.5
    assert drawn[0].axes[0].get_ylabel() == "bleu"


def test_more_lines_than_colours_stay_distinct(tmp_path, drawn):
    rows = [{**ROW, "method": f"method{i}", "bits_per_weight": 2.0, "accuracy": 0.5} for i in range(14)]
    plots.plot_accuracy(rows, tmp_path / "a.png")
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(styles) == 14


def test_what_cannot_be_drawn_is_refused(tmp_path):
    path, w = tmp_path / "x.png", torch.ones(2)
    with pytest.raises(ValueError, match=r"same shape and not be empty, got \(2,\) and \(3,\)"):
        plots.plot_weights(w, torch.ones(3), path, "w")
    with pytest.raises(ValueError, match="not be empty"):
        plots.plot_weights(torch.ones(0), torch.ones(0), path, "w")
    with pytest.raises(ValueError, match="'w' hold NaN or Inf"):
        plots.plot_weights(w, w * float("inf"), path, "w")
    with pytest.raises(ValueError, match="at least one run, got none"):
        plots.plot_ranges({}, path)
    with pytest.raises(ValueError, match="run 'a' has no layer with a std above 0"):
        plots.plot_ranges({"a": []}, path)
    with pytest.raises(ValueError, match="at least one result, got none"):
        plots.plot_accuracy([], path)
    with pytest.raises(ValueError, match=r"rows\[0\] lacks bits_per_weight, accuracy;"):
        plots.plot_accuracy([ROW], path)
    assert not path.exists()


def test_pyplot_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now raises
    plots.plot_weights(torch.ones(2), torch.ones(2), tmp_path / "w.png", "w")
    plots.plot_ranges({"run": [{"name": "w", "range": 1.0, "std": 0.5}]}, tmp_path / "r.png")
    plots.plot_accuracy([{**ROW, "bits_per_weight": 2.0, "accuracy": 0.5}], tmp_path / "a.png")
    assert len(list(tmp_path.iterdir())) == 3
