"""Cross-layer equalization, high-bias absorption, and data-free bias correction."""

import math

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.graph import read_graph
from hf_r2.graph.chains import Pair, chains
from hf_r2.graph.equalize import ClippedReLU, equalize_, unclip_
from hf_r2.graph.fold import fold_, statistics_of
from hf_r2.graph.statistics import clipped_normal, input_statistics
from hf_r2.packed_layers import packed_layers
from hf_r2.report import report
from hf_r2.spec import GRANULARITIES
from tests.models import auto_class, float_model, inputs_for, logits


def _linear(weight):
    weight = torch.tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    return layer


def test_golden_pair():
    model = nn.Sequential(_linear([[4.0, -2.0], [0.5, 0.25]]), nn.ReLU(), _linear([[1.0, 8.0], [-0.25, 2.0]]))
    bias = model[0].bias.detach().clone()
    done = equalize_(model, [Pair("0", "2", "relu", "1")])
    assert done.pairs == 1
    torch.testing.assert_close(model[0].weight, torch.tensor([[2.0, -1.0], [2.0, 1.0]]))
    torch.testing.assert_close(model[2].weight, torch.tensor([[2.0, 2.0], [-0.5, 0.5]]))
    torch.testing.assert_close(model[0].bias, bias / torch.tensor([2.0, 0.25]))


class Chain(nn.Module):
    """conv, relu, grouped conv, relu6, depthwise, transposed, linear on what is left."""

    def __init__(self, clip=nn.ReLU6):
        super().__init__()
        self.a, self.one = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()
        self.b, self.two = nn.Conv2d(8, 8, 3, groups=2, dilation=2, padding=2), clip()
        self.c, self.three = nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()
        self.d = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.e = nn.Linear(6, 4)

    def forward(self, x):
        x = self.three(self.c(self.two(self.b(self.one(self.a(x))))))
        return self.e(self.d(x).mean((2, 3)))


def _chain(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Chain(**kwargs).double().eval()
    with torch.no_grad():
        for name in "abcde":
            layer = model.get_submodule(name)
            layer.weight *= torch.rand_like(layer.weight[:, :1]).mul(6).exp()
            layer.bias *= 5
    x = torch.randn(4, 3, 17, 17, dtype=torch.float64) * 3
    return model, x, chains(read_graph(model, {"x": x}), model)


@pytest.mark.parametrize("seed", range(3))
def test_the_function_is_kept_and_the_ranges_meet(seed):
    model, x, pairs = _chain(seed)
    assert [(p.first, p.second) for p in pairs] == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")]
    true = model(x)
    done = equalize_(model, pairs)
    assert done.relu6 == {"two": "clip"} and isinstance(model.two, ClippedReLU)
    torch.testing.assert_close(model(x), true, rtol=1e-9, atol=1e-9)
    out = model.a.weight.abs().amax((1, 2, 3))
    into = model.b.weight.reshape(2, 4, 4, 9).abs().amax((1, 3)).flatten()  # inputs of a grouped convolution
    torch.testing.assert_close(out, into, rtol=1e-4, atol=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    equalize_(model, [p for p in pairs if p.activation != "relu6"])
    for name, value in model.named_parameters():  # a second time changes nothing
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-9)


def test_a_depthwise_triple_has_one_range():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    r = [
        model[0].weight.abs().amax((1, 2, 3)),
        model[2].weight.abs().amax((1, 2, 3)),
        model[4].weight.abs().amax((0, 2, 3)),
    ]
    equalize_(model, [Pair("0", "2", "relu", "1"), Pair("2", "4", "relu", "3")])
    middle = (r[0] * r[1] * r[2]) ** (1 / 3)
    for weight, dims in ((model[0].weight, (1, 2, 3)), (model[2].weight, (1, 2, 3)), (model[4].weight, (0, 2, 3))):
        torch.testing.assert_close(weight.abs().amax(dims), middle, rtol=1e-4, atol=0)


def test_choices_for_relu6():
    model, x, pairs = _chain()
    true = model(x)
    done = equalize_(model, pairs, "skip")
    assert done.pairs == 3 and done.skipped == ["b -> c: relu6='skip'"] and isinstance(model.two, nn.ReLU6)
    torch.testing.assert_close(model(x), true, rtol=1e-9, atol=1e-9)
    model, x, pairs = _chain()
    done = equalize_(model, pairs, "replace")
    assert done.relu6 == {"two": "replace"} and type(model.two) is nn.ReLU
    assert (model(x) - true).abs().max() > 1e-3  # values above 6 come through: not the same function


def test_dead_channels_are_left_alone():
    model, x, pairs = _chain(clip=nn.ReLU)
    with torch.no_grad():
        model.a.weight[2] = 0
        model.c.weight[:, :, :, :] *= torch.arange(8).ne(5).view(8, 1, 1, 1)
    bias, true = model.a.bias[2].clone(), model(x)
    equalize_(model, pairs)
    torch.testing.assert_close(model(x), true, rtol=1e-9, atol=1e-9)
    assert model.a.bias[2] == bias and all(torch.isfinite(p).all() for p in model.parameters())


def _normed(activation, kernel=1):
    """conv, batch norm with its real statistics, activation, conv."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, kernel, padding=kernel // 2)
    )
    model[1].momentum = None
    with torch.no_grad():
        model[1].bias.normal_(1.5, 2)
        model[1].weight.uniform_(0.2, 1)
    x = torch.randn(64, 3, 6, 6)
    model(x)
    model.eval()
    fold_(model, {"0": "1"})
    return model, x


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_absorption_is_exact_where_the_activation_is_linear(activation):
    model, x = _normed(activation)
    true, before = model(x), statistics_of(model[0]).mean.clone()
    kind = "relu6" if isinstance(activation, nn.ReLU6) else "relu"
    done = equalize_(model, [Pair("0", "3", kind, "2")], absorb=True)
    known = statistics_of(model[0])
    assert done.absorbed == 1 and (known.mean < before * 0 + 3 * known.std + 1e-5).all()
    assert known.mean.sum() < before.sum()
    close = (model(x) - true).abs() < 1e-3
    assert close.float().mean() > 0.97  # inexact for the share of values below mean - 3 std only


def test_nothing_is_absorbed_next_to_padding():
    model, x = _normed(nn.ReLU(), kernel=3)
    true = model(x)
    assert equalize_(model, [Pair("0", "3", "relu", "2", padded=True)], absorb=True).absorbed == 0
    torch.testing.assert_close(model(x), true, rtol=1e-4, atol=1e-4)


def test_equalization_can_be_taken_back():
    model, x = _normed(nn.ReLU6())
    weights = [model[i].weight.detach().clone() for i in (0, 3)]
    pair = Pair("0", "3", "relu6", "2")
    true = model(x)
    equalize_(model, [pair], absorb=True)
    unclip_(model, [pair])
    assert type(model[2]) is nn.ReLU6
    for i, weight in zip((0, 3), weights, strict=True):
        torch.testing.assert_close(model[i].weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mean", "std", "high", "expected"), [(0.3, 0.8, math.inf, 0.491335), (4.0, 2.0, 6.0, 3.850350)]
)
def test_mean_of_a_clipped_normal(mean, std, high, expected):
    one = torch.tensor([mean]), torch.tensor([std]), torch.zeros(1), torch.tensor([high])
    found, var = clipped_normal(*one)
    assert found.item() == pytest.approx(expected, abs=2e-6)
    draws = (mean + std * torch.randn(400_000, generator=torch.Generator().manual_seed(0))).clamp(0, high)
    assert found.item() == pytest.approx(draws.mean().item(), abs=6e-3)
    assert var.item() == pytest.approx(draws.var().item(), rel=1e-2)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_analytic_correction_takes_the_mean_error_away(activation):
    model, x = _normed(activation)
    graph = read_graph(model, {"input": x})
    known = input_statistics(graph, model)["3"]
    read = model[2](model[0](x)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(known.mean, read.mean(1), atol=0.05, rtol=0.05)
    true = model(x)
    off = {}
    for correction in ("none", "analytic", "empirical"):
        options = {"bias_correction": correction, "equalize": False, "absorb": False, "fold": False, "progress": False}
        config = R2QuantConfig("dfq", 2, "per_tensor", False, skip=["0"], options=options)
        packed = quantize(model, config, [{"input": x}])
        off[correction] = (packed(x) - true).mean((0, 2, 3)).abs().max().item()
    assert off["none"] > 0.1
    assert off["analytic"] < 0.25 * off["none"]
    assert off["empirical"] < 1e-4


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet"])
def test_dfq_without_any_data(name, tmp_path, caplog):
    packed = quantize(float_model(name), R2QuantConfig("dfq", 8, "per_tensor", False, act_bits=8))
    notes = report(packed)["notes"]
    assert any("pairs equalized" in note for note in notes) and any(
        "ReLU6 between them: clip" in note for note in notes
    )
    ranged = [m for m in packed.modules() if isinstance(m, InputQuantizer)]
    # From statistics, but for what is behind a max pooling; the range of the images themselves nobody knows.
    assert sum(not m.dynamic for m in ranged) >= {"mobilenet_v1": 27, "mobilenet_v2": 52, "resnet": 3}[name]
    assert any(m.dynamic for m in ranged)
    assert torch.isfinite(logits(packed, name)).all()
    packed.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(packed, name))
    plain = packed.dequantize()
    plain.save_pretrained(tmp_path / "plain")
    back = type(plain).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(back, name), logits(plain, name), rtol=1e-3, atol=1e-4)


def test_dfq_says_what_it_skips_without_batch_norm(caplog):
    model = float_model("mobilebert")
    packed = quantize(model, R2QuantConfig("dfq", 8, options={"equalize": True}), [inputs_for("mobilebert")])
    assert "no batch norm was folded" in caplog.text
    assert "2 pairs equalized" in report(packed)["notes"]
    torch.testing.assert_close(logits(packed, "mobilebert"), logits(model, "mobilebert"), rtol=0.3, atol=0.1)


def test_dfq_equalizes_for_grids_per_tensor_only():
    notes = {
        g: report(quantize(float_model("mobilenet_v1"), R2QuantConfig("dfq", 8, g)))["notes"] for g in GRANULARITIES
    }
    assert "27 pairs equalized" in notes["per_tensor"]
    assert "not equalized: equal ranges serve grids per tensor" in notes["per_channel"]


def test_dfq_options():
    model = float_model("resnet")
    with pytest.raises(ValueError, match="bias_correction must be one of analytic, empirical, none; got 'magic'"):
        quantize(model, R2QuantConfig("dfq", options={"bias_correction": "magic"}))
    with pytest.raises(ValueError, match="'empirical' compares outputs over batches: pass batches"):
        quantize(model, R2QuantConfig("dfq", options={"bias_correction": "empirical"}))
    with pytest.raises(ValueError, match="relu6 must be one of clip, replace, skip; got 'keep'"):
        R2QuantConfig("dfq", options={"relu6": "keep"})
    with pytest.raises(
        TypeError, match="has no option bias_corection; its options are: bias_correction, progress, fold"
    ):
        R2QuantConfig("dfq", options={"bias_corection": "none"})
    with pytest.raises(ValueError, match="equalize works on folded batch norms"):
        R2QuantConfig("nearest", options={"fold": False, "equalize": True})


def test_a_zero_weight_layer_through_dfq():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_var.zero_()
    packed = quantize(model, R2QuantConfig("dfq", 4), [{"input": torch.randn(2, 3, 4, 4)}])
    assert all(torch.isfinite(m.weight).all() for m in packed_layers(packed).values())
    assert torch.isfinite(packed(torch.randn(2, 3, 4, 4))).all()
