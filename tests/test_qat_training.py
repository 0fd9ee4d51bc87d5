"""prepare, train with R2Trainer or Trainer, resume, convert, reload: the whole way of every trained quantizer."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_r2 import R2QuantConfig, R2Trainer, convert, prepare, quantize
from hf_r2.encoders import ENCODERS
from hf_r2.layers import weight_layers
from hf_r2.report import report
from tests.models import float_model, inputs_for, logits
from tests.test_trainer import QUIET, arguments, tiny_resnet
from tests.workers.train_tiny import tiny_bert, tiny_pairs

RECIPES = {
    "lsq": {"method": "lsq", "weight_bits": 2, "act_bits": 4},
    "lsq+": {
        "method": "lsq",
        "weight_bits": 3,
        "granularity": "per_tensor",
        "act_bits": 4,
        "options": {"offset": True},
    },
    "pact": {"method": "pact", "weight_bits": 4, "act_bits": 4},
    "dorefa": {"method": "dorefa", "weight_bits": 1, "act_bits": 2},
    "dkm": {"method": "dkm", "weight_bits": 2, "act_bits": 8},
    "dkm vectors": {"method": "dkm", "weight_bits": 4, "options": {"dim": 3}},
}
IDS = {"input_ids": torch.arange(3, 27).view(4, 6)}


def trained(tmp_path, recipe, model=None, resume=None, **options):
    """A prepared BERT after a few steps of training."""
    model = model or prepare(tiny_bert(), R2QuantConfig(**recipe))
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch", "range_weight": 0.1}
    args = arguments(tmp_path, **{**settings, "learning_rate": 1e-3, **options})
    trainer = R2Trainer(model=model, args=args, train_dataset=tiny_pairs())
    trainer.train(resume_from_checkpoint=resume)
    return model.eval(), trainer


def out(model):
    with torch.no_grad():
        return model(**IDS).logits


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_way(name, tmp_path):
    model, trainer = trained(tmp_path / "run", RECIPES[name])
    keys = model.state_dict().keys()
    assert {"classifier.weight", "classifier.bias", "bert.embeddings.word_embeddings.weight"} <= set(keys)
    again, _ = trained(tmp_path / "resumed", RECIPES[name], resume=str(tmp_path / "run" / "checkpoint-2"))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4").eval()
    assert torch.equal(out(loaded), out(model))
    middle = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    more, _ = trained(tmp_path / "more", RECIPES[name], model=middle)  # goes on from any checkpoint
    assert not torch.equal(out(more), out(model))
    expected = out(model)
    packed = convert(model)
    assert torch.equal(out(packed), expected)
    assert report(packed)["layers"][0]["bits"] == RECIPES[name]["weight_bits"]
    packed.save_pretrained(tmp_path / "packed")
    assert torch.equal(out(BertForSequenceClassification.from_pretrained(tmp_path / "packed")), expected)
    assert "range_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("name", RECIPES)
def test_training_moves_what_can_learn(name, tmp_path):
    start = {k: v.clone() for k, v in prepare(tiny_bert(), R2QuantConfig(**RECIPES[name])).named_parameters()}
    model, _ = trained(tmp_path, RECIPES[name])
    own = [k for k in start if "weight_encoder" in k or "input_quantizer" in k]
    assert bool(own) == (name not in ("dorefa", "dkm vectors"))
    for key in (*own, "bert.encoder.layer.0.intermediate.dense.weight"):
        assert not torch.equal(start[key], dict(model.named_parameters())[key]), key


def test_plain_trainer_trains_it_too(tmp_path):
    model = prepare(tiny_bert(), R2QuantConfig(**RECIPES["lsq"]))
    before = model.classifier.weight_encoder.scale.clone()
    Trainer(model, TrainingArguments(str(tmp_path), max_steps=2, **QUIET), train_dataset=tiny_pairs()).train()
    assert not torch.equal(model.classifier.weight_encoder.scale, before)
    convert(model)


def test_quantizers_are_not_decayed_and_have_their_own_rate(tmp_path):
    model = prepare(tiny_bert(), R2QuantConfig(**RECIPES["lsq"]))
    own = {id(p) for n, p in model.named_parameters() if "weight_encoder" in n or "input_quantizer" in n}
    for rate in (None, 0.5):
        args = arguments(tmp_path, weight_decay=0.1, quantizer_lr=rate, range_loss="none")
        optimizer = R2Trainer(model=model, args=args, train_dataset=tiny_pairs()).create_optimizer()
        groups = [(g, [p for p in g["params"] if id(p) in own]) for g in optimizer.param_groups]
        assert sum(len(mine) for _, mine in groups) == len(own)
        for group, mine in groups:
            assert not mine or group["weight_decay"] == 0
            assert not mine or group["lr"] == (rate or 1e-2)
            assert rate is None or not mine or len(mine) == len(group["params"])
    with pytest.raises(ValueError, match="quantizer_lr must be a number >= 0, got -1"):
        arguments(tmp_path, quantizer_lr=-1.0)


def test_pact_decays_its_clips(tmp_path):
    clips = []
    for decay in (0.0, 2.0):
        recipe = {"method": "pact", "weight_bits": 8, "act_bits": 8, "options": {"clip": 3.0, "clip_decay": decay}}
        model, trainer = trained(
            tmp_path / str(decay), recipe, optim="sgd", max_steps=1, learning_rate=0.01, range_weight=0
        )
        clips.append(model.bert.pooler.dense.input_quantizer.clip.detach())
        count = sum(hasattr(m, "clip") for m in model.modules())
        assert trainer.state.log_history[0]["clip_penalty"] == pytest.approx(count * decay / 2 * 9)
    torch.testing.assert_close(clips[0] - clips[1], torch.tensor(0.01 * 2.0 * 3.0))


def test_accumulation_counts_the_clip_penalty_once(tmp_path):
    recipe = {"method": "pact", "weight_bits": 8, "act_bits": 8, "options": {"clip": 3.0, "clip_decay": 5.0}}
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        model, _ = trained(
            tmp_path / str(steps), recipe, optim="sgd", max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, range_weight=0,
        )  # fmt: skip
        ends.append(model.bert.pooler.dense.input_quantizer.clip.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)


def test_convert_before_training_names_the_layer_and_changes_nothing():
    model = prepare(tiny_bert(), R2QuantConfig(**RECIPES["lsq"]))
    with pytest.raises(
        ValueError, match=r"layer 'bert.encoder.layer.0.attention.self.query': .* train the model before convert"
    ):
        convert(model)
    model.train()(**IDS)
    convert(model)


def test_nan_while_training_names_the_layer(tmp_path):
    for method in ("lsq", "pact", "dkm"):
        model = prepare(tiny_bert(), R2QuantConfig(method, 4))
        with torch.no_grad():
            model.classifier._parameters["weight"][0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"of layer '.*' (holds NaN|is NaN)"):
            trained(tmp_path / method, {}, model=model)


@pytest.mark.parametrize("method", ENCODERS)
def test_quantize_uses_encoders_as_they_start(method):
    model = copy.deepcopy(float_model("resnet"))
    packed = quantize(model, R2QuantConfig(method, 8 if method != "dkm" else 6, act_bits=8), [inputs_for("resnet")])
    if method in ("dorefa", "pact"):  # their levels are those of tanh w
        for layer in weight_layers(model):
            layer.weight.data.tanh_()
    error = (logits(packed, "resnet") - logits(model, "resnet")).abs().max() / logits(model, "resnet").std()
    assert error < 0.3


def test_convolutions_and_plain_modules_train(tmp_path):
    model = prepare(tiny_resnet(), R2QuantConfig("lsq", 4, act_bits=4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, losses = torch.randn(8, 3, 32, 32), []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x).logits, torch.arange(8) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.resnet.embedder.embedder.convolution.input_quantizer.known == 2  # the images have both signs
    assert model.classifier[1].input_quantizer.known == 1


def test_a_training_checkpoint_without_the_library_is_its_float_model(tmp_path):
    model, _ = trained(tmp_path, RECIPES["lsq"], save_steps=4)
    code = (
        "import sys, torch; from transformers import AutoModelForSequenceClassification as A;"
        f"m = A.from_pretrained({str(tmp_path / 'checkpoint-4')!r});"
        "assert 'hf_r2' not in sys.modules; print(m.classifier.weight.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(model.classifier._parameters["weight"].double().sum().item(), abs=1e-9)
    assert "hf_r2" in done.stderr  # transformers says that it does not know the quantization
