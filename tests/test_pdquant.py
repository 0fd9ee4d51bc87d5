"""PD-Quant: its terms against formulas, its settings, and the road through `quantize`."""

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantConfig, quantize
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.graph import read_graph
from hf_r2.graph.chains import batch_norm_folds
from hf_r2.graph.fold import fold_, statistics_of
from hf_r2.ptq.distribution import correct, distance
from hf_r2.ptq.learned_step import LearnedStep, drawn, learned_quantize
from hf_r2.ptq.reconstruct import prediction_difference, reconstruction_error
from tests.models import auto_class, float_model, logits
from tests.test_adaround import _batches


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.1156114281653488), (4.0, 0.019107580721395345)])
def test_prediction_difference(temperature, expected):
    q, p = torch.tensor([[2.0, 1, 0]], dtype=torch.float64), torch.tensor([[3.0, 1, -1]], dtype=torch.float64)
    assert prediction_difference(q, p, temperature).item() == pytest.approx(expected, abs=1e-12)
    both = prediction_difference(torch.cat([q, p]), torch.cat([p, p]), temperature)
    assert both.item() == pytest.approx(expected / 2, abs=1e-12)  # the mean over the batch; nothing where they agree


def test_reconstruction_error_by_hand():
    one, other = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    assert reconstruction_error(one, other, 1).item() == 12.0  # sum over 3 channels of 4, mean over the rest
    assert reconstruction_error(one, other, -1).item() == 16.0


def test_gradients_of_a_learned_step():
    torch.manual_seed(0)
    x, scale = torch.randn(200, dtype=torch.float32) * 2, torch.tensor(0.3)
    x.requires_grad_(True)
    scale.requires_grad_(True)
    upstream = torch.randn(200)
    (learned_quantize(x, scale, 6, 15) * upstream).sum().backward()
    position = x.detach() / 0.3
    inside = (position.round() + 6 >= 0) & (position.round() + 6 <= 15)
    assert torch.equal(x.grad, upstream * inside)
    code = (position.round() + 6).clamp(0, 15) - 6
    slope = torch.where(inside, code - position, code)  # LSQ, eq. 3
    assert scale.grad.item() == pytest.approx((upstream * slope).sum().item() / (200 * 15) ** 0.5, rel=1e-4)


def test_dropping_keeps_the_share_that_is_asked_for():
    quantizer = InputQuantizer(2)
    quantizer.set_range_(torch.tensor(0.0), torch.tensor(3.0))
    step = LearnedStep(quantizer, torch.Generator().manual_seed(0))
    x = torch.rand(3, 4000) * 3
    step.keep = 0.25
    y = step(x)
    kept = (y != x).float().mean().item()
    assert kept == pytest.approx(0.25, abs=0.03)
    assert set(y[y != x].round().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    step.keep = 1.0
    assert torch.equal(step(x), x.round())
    assert drawn(x, 0.5, torch.Generator().manual_seed(1)).shape == (4000,)
    step.scale.data.fill_(0.5)
    assert step.settle_() is quantizer and quantizer.scale == 0.5


def _folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    model[1].momentum = None
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    x = torch.randn(32, 3, 12, 12)
    model(x)
    model.eval()
    fold_(model, batch_norm_folds(read_graph(model, {"input": x}), model))
    return model, x


def test_distribution_correction_moves_towards_the_statistics_and_stays_near():
    model, x = _folded()
    off = x * 1.7 + 0.4
    moved = {w: correct(model, ["0"], model, off, w, 60, 0.01) for w in (1e6, 1e-4)}
    far = {w: distance(model[0](v), statistics_of(model[0])).item() for w, v in moved.items()}
    before = distance(model[0](off), statistics_of(model[0])).item()
    assert far[1e6] < 0.5 * before and far[1e6] < far[1e-4]
    assert (moved[1e-4] - off).abs().mean() < 0.2 * (moved[1e6] - off).abs().mean()  # lambda_c holds the input
    assert torch.equal(correct(model, ["0"], model, off, 1.0, 0, 0.01), off)
    assert torch.equal(correct(nn.Linear(2, 2), [""], None, off, 1.0, 5, 0.01), off)  # no batch norm, nothing to go by


def test_the_distance_is_that_of_the_batch_norm_before_folding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 8, 8)
    y = model[0](x).flatten(2)
    mean = (y.mean(2) - model[1].running_mean).square().sum() / 4
    std = ((y.var(2, correction=0) + 1e-6).sqrt() - (model[1].running_var + 1e-6).sqrt()).square().sum() / 4
    fold_(model, {"0": "1"})
    assert distance(model[0](x), statistics_of(model[0])).item() == pytest.approx((mean + std).item(), rel=1e-3)


def _config(act_bits=4, weight_bits=3, **options):
    options = {"iters": 12, "start_iters": 10, "progress": False, **options}
    return R2QuantConfig("pdquant", weight_bits, symmetric=False, act_bits=act_bits, options=options)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet", "bert", "marian", "vit", "mobilebert"])
def test_models_are_reconstructed_saved_and_loaded(name, tmp_path, caplog):
    model = float_model(name)
    caplog.set_level("INFO", "hf_r2.ptq.pdquant")
    packed = quantize(model, _config(), _batches(name, 2))
    assert sum("error" in r.getMessage() for r in caplog.records) >= 3
    packed.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(packed, name))


def _error(model, packed, batches):
    with torch.no_grad():
        off = [(packed(**b).logits - model(**b).logits).square().mean() for b in batches]
    return torch.stack(off).mean().item()


def test_reconstruction_is_closer_to_the_float_model_than_nearest():
    model, batches = float_model("resnet"), _batches("resnet", 8)
    plain = quantize(model, R2QuantConfig("mse", 3, symmetric=False, act_bits=4), batches)
    for setting in ("pdquant", "qdrop", "brecq"):
        packed = quantize(model, _config(iters=80, start_iters=80, setting=setting), batches)
        assert _error(model, packed, batches) < 0.75 * _error(model, plain, batches), setting


def test_deterministic_and_every_option_counts():
    model, batches = float_model("resnet"), _batches("resnet")
    one, two = (quantize(model, _config(), batches).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    changes = [
        {"setting": "qdrop"}, {"setting": "brecq"}, {"start_iters": 0}, {"correct_bias": False}, {"iters": 20}, {"lr": 0.1},
        {"act_lr": 1e-2}, {"weight_round": 10.0}, {"beta": (4.0, 2.0)}, {"warmup": 0.7}, {"keep": 1.0}, {"prediction": 300.0},
        {"prediction_every": 1}, {"temperature": 1.0}, {"correction": 10.0, "correction_steps": 20, "correction_lr": 0.1},
        {"correction_steps": 0, "correction_lr": 0.1}, {"samples": 5}, {"seed": 1},
    ]  # fmt: skip
    for change in changes:
        base = {"correction_steps": 20, "correction_lr": 0.1} if "correction_lr" in change else {}
        plain = quantize(model, _config(**base), batches).state_dict() if base else one
        other = quantize(model, _config(**{**base, **change}), batches).state_dict()
        assert any(not torch.equal(plain[key], other[key]) for key in plain), change


def test_qdrop_is_pdquant_without_its_terms():
    model, batches = float_model("resnet"), _batches("resnet")
    one = quantize(model, _config(setting="qdrop"), batches).state_dict()
    two = quantize(model, _config(prediction=0.0, correction_steps=0), batches).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    import hf_r2.ptq.pdquant as module

    model, batches = float_model("resnet"), _batches("resnet")
    whole = quantize(model, _config(), batches).state_dict()
    learn, calls = module.learn_block_, []

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(module, "learn_block_", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, _config(resume_dir=str(tmp_path)), batches)
    again = quantize(model, _config(resume_dir=str(tmp_path)), batches).state_dict()
    assert len(calls) == 3 + 2  # of the four blocks two were not learned again
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_damaged_note_is_not_trusted(tmp_path):
    model, batches = float_model("resnet"), _batches("resnet")
    whole = quantize(model, _config(resume_dir=str(tmp_path)), batches).state_dict()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4
    files[0].write_bytes(files[0].read_bytes()[:50])
    again = quantize(model, _config(resume_dir=str(tmp_path)), batches).state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; it must be a folder"):
        quantize(model, _config(resume_dir=str(tmp_path / "file")), batches)


def test_settings():
    with pytest.raises(ValueError, match="setting must be one of pdquant, qdrop, brecq; got 'magic'"):
        quantize(float_model("resnet"), _config(setting="magic"), _batches("resnet"))
