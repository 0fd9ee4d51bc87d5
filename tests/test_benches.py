"""The bench scripts: candidates of a comparison compute the same, take turns, and the tables show ratios of medians."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from tests.models import float_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
benching, ranges, packing, loading, kernels = (
    importlib.import_module(f"bench{name}") for name in ("ing", "_range_loss", "_packing", "_loading", "_kernels")
)


def test_candidates_take_turns_and_medians_leave_the_warm_up_out():
    now, order = [0.0], []
    costs = {"a": iter([9, 1, 5, 3]), "b": iter([9, 2, 2, 8])}

    def run(name):
        order.append(name)
        now[0] += next(costs[name])

    found = benching.medians({name: lambda name=name: run(name) for name in costs}, 3, clock=lambda: now[0])
    assert order == ["a", "b"] * 4 and found == {"a": 3, "b": 2}


@pytest.mark.parametrize("kind", ["l_inf", "margin", "soft_min_max"])
def test_what_the_range_bench_compares_is_the_same_loss(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    for layer in model:
        layer.weight.data[0, 0] = 1.0  # what the margins leave outside
    runs = ranges.candidates(model, ranges.BenchArguments(kind=kind))
    found = {}
    for name in runs.keys() - {"floor"}:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        runs[name]()
        found[name] = torch.cat([m.weight.grad.flatten() for m in model])
    assert {"hf_r2", "returned", "autograd"} <= found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, found["autograd"], rtol=2e-5, atol=1e-8, msg=name)
    assert found["hf_r2"].abs().sum() > 0


def test_what_the_packing_bench_times_undoes_itself():
    w = torch.randn(8, 128)
    runs = packing.candidates(w, 3)
    assert torch.equal(runs["copy"](), w)
    assert torch.equal(runs["unpack"]().view(8, 128), runs["nearest"]()) and runs["pack"]().numel() == 8 * 128 * 3 // 8
    with pytest.raises(ValueError, match="rounds must be at least 9"):
        packing.main(packing.BenchArguments(rounds=3))


def test_the_packing_bench_prints_ratios(capsys):
    (args,) = HfArgumentParser(packing.BenchArguments).parse_args_into_dataclasses(
        ["--numel", "4096", "--bits", "4", "8", "--rounds", "9"]
    )
    packing.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["bits 4", "bits 8"] and "unpack" in lines[1]


def test_loading_shows_medians_and_their_ratio_to_float():
    text = loading.table({"float": [0.2, 0.1, 0.9], "4 bits": [0.1, 0.1, 0.4]})
    assert text.splitlines()[2:] == ["| float | 200 | 1.00 |", "| 4 bits | 100 | 0.50 |"]


def test_loading_saves_what_it_loads(tmp_path, monkeypatch):
    tiny = float_model("mobilebert").config
    monkeypatch.setattr(loading, "MobileBertConfig", lambda: tiny)
    folders = loading.saved(tmp_path)
    assert list(folders) == ["float", *loading.RECIPES]
    took, printed = loading.seconds("print(6 * 7)")
    assert printed == "42\n" and took > 0
    assert float(loading.seconds(loading.LOAD, str(folders["3 bits"]))[1]) > 0


def test_kernels_are_compared_with_the_decoded_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=384, num_hidden_layers=1, num_attention_heads=4, intermediate_size=384
    )
    model, ids = BertForSequenceClassification(config).eval(), torch.randint(3, 50, (1, 32))
    refused = kernels.row("W8", model, ids, 1)
    assert refused.startswith("| W8 | - | - | - | refused: ")
    row = kernels.row("W8A8", model, ids, 1)
    assert row.startswith("| W8A8 | ") and ("layers on int8" in row or "refused" in row)
