"""`RangeLoss`: which weights it reads, its scalars, the size-aware and the deployed form, its summary."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
)

from hf_r2 import RANGE_LOSSES, R2QuantConfig, RangeLoss, prepare, soft_min_max
from hf_r2.layers import folded_weight, following_batch_norms, weight_layers
from hf_r2.losses import LOWEST_ALPHA, size_aware_alpha
from tests.reference.range_loss import soft_min_max as slow


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def test_sum_over_weights_with_one_alpha_each():
    model = small()
    loss = RangeLoss(model, alpha=0.7).double()
    expected = soft_min_max(model[0].weight, 0.7) + soft_min_max(model[2].weight, 0.7)
    torch.testing.assert_close(loss(), expected)
    torch.testing.assert_close(loss(only={"2"}), soft_min_max(model[2].weight, 0.7))
    assert loss(only=set()).item() == 0
    loss().backward()
    assert loss.scalars.grad.shape == (2,)
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "start"), [("soft_min_max", 0.1), ("margin", None), ("l_inf", 0.1)])
def test_only_the_scalars_are_its_parameters(kind, start):
    model = small()
    loss = RangeLoss(model, kind)
    assert [n for n, _ in loss.named_parameters()] == ["scalars"]
    assert list(loss.state_dict()) == ["scalars"]
    assert loss.trainable is (kind != "l_inf")
    expected = start if start else model[0].weight.abs().max().item()
    assert loss.scalars[0].item() == pytest.approx(expected)


def test_weights_of_transformers_are_found_once():
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    assert len(RangeLoss(bert).names) == 3 + 6 + 1 + 1  # tables, one block, pooler, classifier
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    assert len(RangeLoss(gpt2).names) == 2 + 4  # wte (tied to the head), wpe, four Conv1D
    config = MarianConfig(
        vocab_size=20, decoder_vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, max_position_embeddings=8,
    )  # fmt: skip
    marian = MarianMTModel(config)
    assert len(RangeLoss(marian).names) == 1 + 6 + 10  # one shared table; sinusoidal positions are not weights
    assert len(weight_layers(marian, tied=True)) == 4 + 16


def test_frozen_weights_are_left_out():
    model = small()
    model[0].weight.requires_grad_(False)
    assert RangeLoss(model).names == ["2"]
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable linear, convolution or embedding weight"):
        RangeLoss(model)


def test_skip_by_glob():
    assert RangeLoss(small(), skip=["0"]).names == ["2"]
    with pytest.raises(ValueError, match="'nothing' matches no layer; the weight layers are: 0, 2"):
        RangeLoss(small(), skip=["nothing"])


def test_alpha_stays_positive_where_the_paper_s_form_would_turn():
    torch.manual_seed(0)
    model = nn.Linear(17, 17, bias=False)
    with torch.no_grad():
        model.weight.normal_()  # std above .67: alpha's gradient is positive at .1, and it falls
    loss = RangeLoss(model)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    unprojected = torch.tensor(0.1, requires_grad=True)
    for _ in range(2000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        loss.project_()
        width = loss().item() - math.exp(-loss.scalars.item())
        assert loss.scalars.item() >= LOWEST_ALPHA * (1 - 1e-6)
        assert width >= 0
    for _ in range(200):  # the same flow without the projection does cross zero: the test above is not idle
        value = slow(model.weight.detach(), unprojected)
        (slope,) = torch.autograd.grad(value, unprojected)
        unprojected = (unprojected - 0.05 * slope).detach().requires_grad_()
    assert unprojected.item() < 0


def test_alpha_stays_positive_in_a_loop_that_does_not_project():
    model = nn.Linear(17, 17, bias=False)
    with torch.no_grad():
        model.weight.normal_()
    loss = RangeLoss(model)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        value = loss()
        assert value.item() >= math.exp(-loss.scalars.item())  # s_max >= s_min
        assert loss.scalars.item() >= LOWEST_ALPHA * (1 - 1e-6)
        value.backward()
        optimizer.step()


def test_alpha_settles_where_the_closed_form_says():
    torch.manual_seed(0)
    model = nn.Linear(96, 96, bias=False)
    with torch.no_grad():
        model.weight.normal_(std=0.05)
    loss = RangeLoss(model, alpha=4.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=20.0)
    for _ in range(500):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    alpha, w = loss.scalars.item(), model.weight.detach().flatten().double()
    p, q = torch.softmax(alpha * w, 0), torch.softmax(-alpha * w, 0)
    spread = sum((s * (w - (s * w).sum()).square()).sum().item() for s in (p, q))
    assert spread == pytest.approx(math.exp(-alpha), rel=0.02)  # Var_p + Var_q = exp(-alpha)
    assert 5 < alpha < 5.6


def pull_on_outlier(numel, scale=1.0, **options):
    """Gradient on a weight 1.5 times as far out as the bulk's extreme, times the std: the pull in the weight's own units."""
    torch.manual_seed(0)
    model = nn.Linear(numel, 1, bias=False).double()
    with torch.no_grad():
        model.weight.normal_()
        model.weight[0, 0] = 1.5 * model.weight.abs().max()
        model.weight *= scale
        std = model.weight.std(correction=0).item()
    RangeLoss(model, **options).double()().backward()
    return model.weight.grad[0, 0].item() * (std if options.get("units") == "std" else 1.0)


def test_size_aware_pull_does_not_vanish_with_size_or_scale():
    for numel in (10**2, 10**3, 10**4, 10**5, 10**6):
        assert pull_on_outlier(numel, units="std") > 0.8
    for scale in (1e-3, 1e3):
        assert pull_on_outlier(10**4, scale, units="std") == pytest.approx(
            pull_on_outlier(10**4, units="std"), rel=1e-9
        )


def test_the_paper_s_pull_falls_like_one_over_n():
    assert pull_on_outlier(10**3) / pull_on_outlier(10**5) > 50
    # at alpha std << 1 the width is 2 alpha Var(w), and the pull 4 alpha (w - mean) / N
    torch.manual_seed(0)
    w = (torch.randn(5000, dtype=torch.float64) * 1e-3).requires_grad_()
    soft_min_max(w, 0.1).backward()
    expected = 4 * 0.1 * (w.detach() - w.detach().mean()) / 5000
    torch.testing.assert_close(w.grad, expected, rtol=1e-3, atol=1e-12)


def test_size_aware_alpha_is_the_condensation_temperature():
    for numel in (100, 10**6):
        alpha = size_aware_alpha(numel)
        # the weight at the expected extreme has as much softmax mass as the bulk expects of all: exp(alpha^2/2) N
        assert math.exp(alpha * alpha) / (numel * math.exp(alpha**2 / 2)) == pytest.approx(1.0)
    loss = RangeLoss(nn.Linear(10, 10), units="std")
    assert loss.scalars.item() == pytest.approx(math.sqrt(2 * math.log(100)))
    assert loss.trainable is False
    assert RangeLoss(nn.Linear(10, 10), units="std", alpha=3).scalars.item() == 3


def test_std_units_measure_the_weight_in_its_own_detached_std():
    model = nn.Linear(8, 8, bias=False).double()
    loss = RangeLoss(model, units="std", alpha=3).double()
    x = (model.weight / model.weight.std(correction=0)).detach().requires_grad_()
    value = soft_min_max(x, 3.0)
    value.backward()
    torch.testing.assert_close(loss(), value)
    loss().backward()
    torch.testing.assert_close(model.weight.grad, x.grad / model.weight.detach().std(correction=0))
    with torch.no_grad():
        model.weight.fill_(0.3)  # constant: no range, no NaN
    model.weight.grad = None
    loss().backward()
    assert torch.isfinite(model.weight.grad).all()


def conv_bn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        model[1].running_var.copy_(torch.tensor([0.01, 1.0, 4.0, 0.5]))
        model[1].weight.copy_(torch.tensor([2.0, -1.0, 0.5, 1.0]))
    return model.eval()


@pytest.mark.parametrize("kind", ["margin", "l_inf"])
def test_std_units_of_the_other_losses(kind):
    model = nn.Linear(8, 8, bias=False).double()
    loss = RangeLoss(model, kind, units="std").double()
    if kind == "margin":
        loss.scalars.data.fill_(1.2)  # standard deviations
    x = (model.weight / model.weight.std(correction=0)).detach().requires_grad_()
    size = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    value = RANGE_LOSSES[kind].function(x, *((size,) if kind == "margin" else ()))
    value.backward()
    torch.testing.assert_close(loss(), value)
    loss().backward()
    torch.testing.assert_close(model.weight.grad, x.grad / model.weight.detach().std(correction=0))
    if kind == "margin":
        torch.testing.assert_close(loss.scalars.grad[0], size.grad)


def test_relative_units_have_the_value_of_std_and_steps_in_proportion_to_the_weight():
    def grads(units, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double()
        model[0].weight.data *= scale
        loss = RangeLoss(model, units=units, alpha=3, target="deployed").double()()
        loss.backward()
        return loss.item(), model[0].weight, model[1].weight.grad

    value, w, gamma = grads("std", 1.0)
    for scale in (1.0, 0.01):
        same, w2, gamma2 = grads("relative", scale)
        assert same == pytest.approx(value, rel=1e-9)
        assert torch.allclose(w2.grad, scale * w.grad * w.detach().var(correction=0), rtol=1e-9)
        assert torch.allclose(gamma2, gamma, rtol=1e-9) and gamma.abs().max() > 0


def test_a_broken_weight_is_not_hidden_by_std_units():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert math.isnan(RangeLoss(model, units="std")().item())


def test_wrapped_models_keep_their_layer_names():
    model = small()
    assert RangeLoss(torch.compile(nn.DataParallel(model), backend="eager")).names == ["0", "2"]
    loss = RangeLoss(model)
    before = loss().item()
    torch.compile(model, backend="eager")
    with torch.no_grad():
        model[0].weight *= 2
    assert loss().item() > before


def test_two_losses_before_one_backward():
    model = small()
    loss = RangeLoss(model)
    (loss() + 2 * loss()).backward()
    thrice = model[0].weight.grad.clone()
    model.zero_grad()
    loss().backward()
    torch.testing.assert_close(thrice, 3 * model[0].weight.grad)


@pytest.mark.parametrize("target", ["raw", "deployed"])
@pytest.mark.parametrize("units", ["absolute", "std", "relative"])
@pytest.mark.parametrize("dim", [1, 2])
def test_every_combination_of_units_target_and_dim(target, units, dim):
    model = conv_bn()
    loss = RangeLoss(model, alpha=0.8, target=target, units=units, dim=dim, trainable=False).double()
    expected = 0.0
    for layer, norm in ((model[0], model[1]), (model[3], None)):
        w = folded_weight(layer.weight, norm) if norm is not None and target == "deployed" else layer.weight
        expected += soft_min_max(w if units == "absolute" else w / w.std(correction=0), 0.8, dim)
    torch.testing.assert_close(loss(), expected)


def test_deployed_weight_is_the_folded_one_and_differentiable():
    model = conv_bn()
    assert list(following_batch_norms(model)) == ["0"]
    fused = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(folded_weight(model[0].weight, model[1]), fused.weight)
    loss = RangeLoss(model, target="deployed", alpha=1.0).double()
    expected = soft_min_max(fused.weight, 1.0) + soft_min_max(model[3].weight, 1.0)
    torch.testing.assert_close(loss(), expected)
    loss().backward()
    weight, gamma = model[0].weight, model[1].weight
    step = 1e-6
    for parameter, index in ((weight, (1, 2, 0, 1)), (gamma, (0,))):
        with torch.no_grad():
            parameter[index] += step
            above = loss().item()
            parameter[index] -= 2 * step
            below = loss().item()
            parameter[index] += step
        assert parameter.grad[index].item() == pytest.approx((above - below) / (2 * step), abs=1e-7)
    assert loss.summary()[0]["range"] == pytest.approx((fused.weight.max() - fused.weight.min()).item())


def test_summary_of_known_weights():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    (row,) = RangeLoss(model, alpha=0.2).summary()
    assert row == {
        "name": "",
        "numel": 4,
        "range": 2.0,
        "std": 1.0,
        "range_over_std": 2.0,
        "kurtosis": 1.0,
        "alpha": pytest.approx(0.2),
    }
    assert RangeLoss(model, "margin").summary()[0]["margin"] == 1.0
    assert RangeLoss(model).mean_range_over_std().item() == 2.0


def test_prepared_models_are_read_before_their_encoder():
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    expected = RangeLoss(model, alpha=1.0).double()().item()
    prepare(model, R2QuantConfig(method="dkm", weight_bits=1))
    assert RangeLoss(model, alpha=1.0).double()().item() == pytest.approx(expected, rel=1e-12)
    assert model[0].weight.detach().max().item() != model[0]._parameters["weight"].detach().max().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l2"}, "no range loss called 'l2'; there are: l_inf, margin, soft_min_max"),
        ({"alpha": -1.0}, "alpha must be a positive number"),
        ({"alpha": 1.0, "kind": "margin"}, "alpha is for soft_min_max"),
        ({"units": "meters"}, "units must be one of absolute, std, relative"),
        ({"target": "folded"}, "target must be one of raw, deployed"),
        ({"dim": 0}, "dim must be an integer of at least 1"),
        ({"dim": 2, "kind": "l_inf"}, "dim is for soft_min_max"),
        ({"units": "std", "trainable": True}, "needs a fixed alpha"),
        ({"units": "relative", "trainable": True}, "units='relative' needs a fixed alpha"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RangeLoss(small(), **options)
