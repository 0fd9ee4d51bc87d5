"""CoRa: the Butterworth kernel, the search, the budget, biases, and what a user can get wrong."""

import json
import logging

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.encoders.adapted import Filtered, butterworth
from hf_r2.packed_layers import encoded, packed_layers
from hf_r2.ptq.rank_search import over_budget
from hf_r2.report import report
from tests.models import float_model, inputs_for, logits


def cora(bits=3, skip=(), **options):
    return R2QuantConfig("cora", bits, symmetric=False, skip=skip, options={"iters": 4, "progress": False, **options})


def ranks(packed):
    return {row["name"]: row["rank"] for row in report(packed)["layers"]}


def test_butterworth_golden():  # ALGORITHMS section 5.3, order 4
    one = torch.tensor([1e-9, 10.0, 20.0], dtype=torch.float64)
    phi = butterworth(one, torch.tensor(10.0, dtype=torch.float64).log(), 4)
    torch.testing.assert_close(
        phi, torch.tensor([1.0, 0.7071067812, 0.0623782861], dtype=torch.float64), rtol=1e-7, atol=0
    )


def test_butterworth_falls_with_the_rank_and_rises_with_the_cutoff():
    rank = torch.arange(100, dtype=torch.float64) + 0.5
    low, high = (butterworth(rank, torch.tensor(c, dtype=torch.float64).log(), 6) for c in (20.0, 25.0))
    assert (low > 0).all() and (low <= 1).all() and (low.diff() <= 0).all() and (high >= low).all()
    sharp = butterworth(rank, torch.tensor(20.0, dtype=torch.float64).log(), 4000)
    assert torch.equal(sharp.round(), (rank < 20).double())  # the indicator, and no NaN from 5**8000
    assert torch.isfinite(sharp).all()


def test_butterworth_gradient():  # dphi/drho = (n / rho) t^(2n) (1 + t^(2n))^(-3/2), t = rank / rho
    rank = torch.tensor([0.5, 3.0, 7.5, 30.0], dtype=torch.float64)
    log_cutoff = torch.tensor(7.0, dtype=torch.float64).log().requires_grad_()
    found = (
        torch.stack(
            [torch.autograd.grad(p, log_cutoff, retain_graph=True)[0] for p in butterworth(rank, log_cutoff, 4)]
        )
        / 7.0
    )
    t = (rank / 7.0) ** 8
    torch.testing.assert_close(found, 4 / 7.0 * t * (1 + t) ** -1.5)
    assert torch.autograd.gradcheck(lambda c: butterworth(rank, c, 4), log_cutoff)


def test_filtered_goes_from_the_rounded_weight_to_the_float_one():
    weight = torch.randn(6, 4, 3, 3)
    rounded = weight.round()
    u, s, v = torch.linalg.svd((weight - rounded).flatten(1), full_matrices=False)
    for cutoff, expected in ((1e-3, rounded), (1e3, weight)):
        torch.testing.assert_close(
            Filtered(rounded, u * s, v, "right", 4, cutoff)(weight), expected, rtol=0, atol=1e-5
        )
    half = Filtered(rounded, u * s, v, "right", 4, 2.5)  # component 2 stands at the cut-off: 1/2 of its value passes
    gain = half.gain().detach()
    assert gain[2] == pytest.approx(0.5) and gain[0] > 0.99
    half(weight).sum().backward()
    assert half.log_cutoff.grad.abs() > 0 and [n for n, _ in half.named_parameters()] == ["log_cutoff"]


def test_penalty():  # gamma exp(relu(10 (used - 1)))
    used = torch.tensor([0.5, 1.0, 1.2, 1e9], requires_grad=True)
    value = over_budget(used, 2.0)
    torch.testing.assert_close(value[:3], torch.tensor([2.0, 2.0, 2 * 7.3890561]))
    value.sum().backward()
    assert used.grad[0] == 0 and used.grad[2] == pytest.approx(2 * 10 * 7.3890561) and torch.isfinite(used.grad).all()


def pair(bias=True):
    """Two linear layers side by side, of which one hardly matters."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.strong, self.weak = nn.Linear(24, 24, bias=bias), nn.Linear(24, 24, bias=bias)

        def forward(self, x):
            return 6 * self.strong(x) + 0.01 * self.weak(x)

    torch.manual_seed(0)
    return Pair().eval(), [{"x": torch.randn(64, 24) + 1}]


@pytest.mark.parametrize("bias", [True, False])
def test_the_search_gives_ranks_to_the_layer_that_matters(bias):
    model, batches = pair(bias)
    searched = ranks(quantize(model, cora(budget=0.25, iters=40, batch_size=64), batches))
    equal = ranks(quantize(model, cora(budget=0.25, ranks="equal"), batches))
    assert equal == {"strong": 3, "weak": 3}
    assert searched["strong"] >= 5 and searched["strong"] + searched["weak"] == 6


def prediction_error(packed, model, batches):
    with torch.no_grad():
        p, q = (torch.log_softmax(m(**batches[0]), -1) for m in (model, packed))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_searched_ranks_predict_better_than_equal_ones_and_both_than_none():
    model, batches = pair()
    settings = ({"budget": 1e-9}, {"budget": 0.25, "ranks": "equal"}, {"budget": 0.25, "iters": 40, "batch_size": 64})
    none, equal, searched = (
        prediction_error(quantize(model, cora(2, **s), batches), model, batches) for s in settings
    )
    assert searched < 0.9 * equal and equal < 0.9 * none


@pytest.mark.parametrize("base", ["nearest", "mse", "squant", "adaround"])
def test_bases_keep_their_codes_and_come_closer(base):
    model, batches = float_model("resnet"), [inputs_for("resnet")]
    options = {"iters": 5, "progress": False} if base == "adaround" else {}
    plain = quantize(model, R2QuantConfig(base, 3, symmetric=False, options=options), batches)
    packed = quantize(model, cora(base=base, base_options=options, budget=0.8, adapter_bits=16), batches)
    for name, layer in packed_layers(packed).items():
        assert torch.equal(encoded(layer).codes, encoded(packed_layers(plain)[name]).codes)
    off = [(logits(p, "resnet") - logits(model, "resnet")).norm() for p in (packed, plain)]
    assert off[0] < 0.7 * off[1]


@pytest.mark.parametrize("budget", [0.03, 1.0])
def test_the_budget_is_respected_and_counted(budget):
    model, batches = float_model("mobilenet_v1"), [inputs_for("mobilenet_v1")]
    packed = quantize(model, cora(4, budget=budget, adapter_bits=16), batches)
    rows = report(packed)["layers"]
    layers = {name: encoded(layer) for name, layer in packed_layers(packed).items()}
    weights = sum(row["numel"] for row in rows)
    numbers = sum(e.adapter.left.numel() + e.adapter.right.numel() for e in layers.values() if e.adapter is not None)
    assert 0.97 * budget * weights < numbers <= budget * weights
    plain = quantize(model, R2QuantConfig("squant", 4, symmetric=False), batches)
    added = report(packed)["bits_per_weight"] - report(plain)["bits_per_weight"]
    assert added == pytest.approx(16 * numbers / weights)  # b + m * adapter / weights
    assert sum(row["rank"] > 0 for row in rows) > 1


def test_depthwise_layers_get_ranks_too():
    model, batches = float_model("mobilenet_v1"), [inputs_for("mobilenet_v1")]
    packed = quantize(model, cora(2, budget=0.9, ranks="equal"), batches)
    depthwise = {n: m for n, m in packed_layers(packed).items() if getattr(m, "groups", 1) > 1}
    assert len(depthwise) == 13 and all(encoded(m).adapter.rank >= 3 for m in depthwise.values())
    plain = quantize(model, R2QuantConfig("squant", 2, symmetric=False), batches)
    for name, layer in depthwise.items():
        true = quantize(model, R2QuantConfig("nearest", 8), batches).get_submodule(name).weight  # folded, nearly float
        assert (layer.weight - true).norm() < 0.85 * (plain.get_submodule(name).weight - true).norm()
        break


def test_biases_make_up_for_what_the_adapters_leave():
    """squant corrects biases for all of the rounding error; with an adapter on top that would be too much."""
    model, batches = float_model("resnet"), [inputs_for("resnet")]
    first = "resnet.embedder.embedder.convolution"
    means = []
    for source in (model, quantize(model, cora(2, budget=0.9, adapter_bits=16), batches)):
        module = source.get_submodule(first if source is not model else "resnet.embedder.embedder.normalization")
        handle = module.register_forward_hook(lambda _, __, y: means.append(y.mean((0, 2, 3))))
        logits(source, "resnet")
        handle.remove()
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-5)
    left = quantize(model, cora(2, budget=0.9, adapter_bits=16, correct_bias=False), batches).get_submodule(first).bias
    plain = quantize(model, R2QuantConfig("squant", 2, symmetric=False), batches).get_submodule(first).bias
    assert torch.equal(left, plain)


def test_the_model_is_left_as_it_was():
    model = float_model("resnet").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    packed = quantize(model, cora(fold=False), [inputs_for("resnet")])
    model.eval()
    after = packed.state_dict()
    norms = [key for key in before if "normalization" in key]
    assert norms and all(torch.equal(before[key], after[key]) for key in norms)  # running statistics too
    assert packed.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in packed.parameters() if p.is_floating_point())


def test_labels_as_the_teacher():
    batches = [{**inputs_for("resnet"), "labels": torch.tensor([0, 1])}]
    config = cora(teacher="labels", iters=10, budget=0.2)
    assert sum(ranks(quantize(float_model("resnet"), config, batches)).values()) > 0
    with pytest.raises(
        ValueError, match="teacher='labels' needs a tensor of labels in every batch; batch 0 has pixel"
    ):
        quantize(float_model("resnet"), config, [inputs_for("resnet")])


def test_the_trace_says_what_was_found(tmp_path):
    file = tmp_path / "deeper" / "trace.json"
    packed = quantize(float_model("resnet"), cora(budget=0.2, trace_file=file), [inputs_for("resnet")])
    trace = json.loads(file.read_text())
    assert {row["name"]: row["rank"] for row in trace["layers"]} == ranks(packed)
    assert len(trace["losses"]) == 4 and set(trace["seconds"]) == {"base", "svd", "teacher", "search"}
    for row in trace["layers"]:
        assert row["singular_values"] == sorted(row["singular_values"], reverse=True) and row["cutoff"] > 0


def test_deterministic_and_every_option_counts(tmp_path):
    model, batches = pair()

    def found(**options):
        settings = {"budget": 0.25, "iters": 8, "batch_size": 16, "trace_file": tmp_path / "trace.json", **options}
        packed = quantize(model, cora(**settings), batches)
        tensors = [p.detach().flatten() for m in packed_layers(packed).values() for p in (m.weight, m.bias)]
        cutoffs = [layer["cutoff"] or 0.0 for layer in json.loads((tmp_path / "trace.json").read_text())["layers"]]
        return torch.cat([*tensors, torch.tensor(cutoffs)])

    same = found()
    assert torch.equal(same, found())
    for other in (
        {"budget": 0.4},
        {"adapter_bits": 8},
        {"ranks": "equal"},
        {"base": "nearest"},
        {"iters": 60},
        {"lr": 0.01},
        {"metric": "weights"},
        {"order": 1},
        {"gamma": 1e-6},
        {"correct_bias": False},
        {"samples": 16},
    ):
        assert not torch.equal(same, found(**other)), other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be above 0 and at most 1, got 0"),
        ({"budget": -0.1}, "budget must be above 0 and at most 1, got -0.1"),
        ({"budget": 1.5}, "budget must be above 0 and at most 1, got 1.5"),
        ({"budget": float("nan")}, "budget must be above 0 and at most 1, got nan"),
        ({"budget": "5%"}, "budget must be above 0 and at most 1, got '5%'"),
        ({"base": "pdquant"}, "base must be one of nearest, mse, squant, adaround; got 'pdquant'"),
        ({"ranks": "best"}, "ranks must be one of search, equal; got 'best'"),
        ({"teacher": "me"}, "teacher must be one of logits, labels; got 'me'"),
        ({"adapter_bits": 12}, "adapter_bits must be an integer from 2 to 8, or 16 for float16, got 12"),
        ({"iters": 0}, "iters must be an integer from 1 on, got 0"),
        ({"order": 2.5}, "order must be an integer from 1 on, got 2.5"),
        ({"lr": 0}, "lr must be above 0, got 0"),
    ],
)
def test_options_are_checked_when_the_recipe_is_written(options, message):
    with pytest.raises(ValueError, match=message):
        R2QuantConfig("cora", options=options)


def test_unknown_options():
    with pytest.raises(
        TypeError, match="method 'cora' has no option rank; its options are: base, base_options, budget"
    ):
        R2QuantConfig("cora", options={"rank": 3})
    with pytest.raises(TypeError, match="base 'squant' has no option iters; its options are: bias_correction"):
        R2QuantConfig("cora", options={"base_options": {"iters": 3}})


def test_batches_are_needed():
    with pytest.raises(ValueError, match="batches are needed: method 'cora' reads the inputs of the layers"):
        quantize(float_model("resnet"), cora())


def test_layers_that_get_no_adapter_are_named(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(8).repeat(4, 1) - 4)  # 3 bits hold it exactly
    with caplog.at_level(logging.WARNING):
        packed = quantize(model, cora(base="nearest", budget=1.0), [{"input": torch.randn(8, 8)}])
    assert "no adapter for layers that rounding left as they were: 0" in caplog.text
    assert ranks(packed)["0"] == 0 and ranks(packed)["2"] > 0
    with caplog.at_level(logging.WARNING):
        packed = quantize(float_model("gpt2"), cora(budget=0.5), [inputs_for("gpt2")])
    assert "no adapter for layers that share their weight: transformer.wte, lm_head" in caplog.text
    assert ranks(packed)["transformer.wte"] == 0 and max(ranks(packed).values()) > 0
