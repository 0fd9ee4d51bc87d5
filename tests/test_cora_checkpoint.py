"""Adapters in packed checkpoints: live after from_pretrained, counted, merged, trained alone, and damage that is named."""

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_r2 import R2QuantConfig, packed_in_memory, quantize, train_adapters_
from hf_r2.packed_layers import adapter_of, encoded, packed_layers
from hf_r2.report import report
from tests.models import auto_class, float_model, inputs_for, logits


def packed_model(name="resnet", bits=4, **options):
    options = {"iters": 3, "budget": 0.3, "progress": False, **options}
    return quantize(
        float_model(name), R2QuantConfig("cora", bits, symmetric=False, options=options), [inputs_for(name)]
    )


def adapters(model):
    return {n: a for n, m in packed_layers(model).items() if (a := adapter_of(m)) is not None}


@pytest.mark.parametrize(("name", "bits"), [("resnet", 16), ("resnet", 8), ("resnet", 3), ("gpt2", 4), ("bert", 16)])
def test_adapters_come_back(name, bits, tmp_path):
    packed = packed_model(name, adapter_bits=bits)
    packed.save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, name), logits(packed, name))
    assert adapters(loaded).keys() == adapters(packed).keys() and len(adapters(loaded)) > 1
    assert report(loaded)["bits_per_weight"] == report(packed)["bits_per_weight"]
    assert not any(p.requires_grad for a in adapters(loaded).values() for p in a.parameters())
    with packed_in_memory():
        small = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(small, name), logits(packed, name))
    for key, layer in packed_layers(loaded).items():
        e = encoded(layer)
        if e.adapter is not None:  # and they are what makes the difference
            assert (layer.weight - e.decode_codes()).norm() > 0.003 * layer.weight.norm(), key


def test_half_precision_computes_with_the_same_factors(tmp_path):
    packed = packed_model(adapter_bits=16)
    packed.save_pretrained(tmp_path)
    half = auto_class("resnet").from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, adapter in adapters(packed).items():
        assert adapters(half)[name].left.dtype == torch.float16
        assert torch.equal(adapters(half)[name].left, adapter.left)
        assert torch.equal(adapters(packed.to(torch.bfloat16))[name].right, adapter.right)
    assert half.get_submodule(next(iter(adapters(half)))).weight.dtype == torch.bfloat16


def test_adapters_are_merged_into_a_float_model(tmp_path):
    packed = packed_model()
    expected = logits(packed, "resnet")
    packed.dequantize()
    assert not packed_layers(packed) and not any("adapter" in key for key in packed.state_dict())
    torch.testing.assert_close(logits(packed, "resnet"), expected, rtol=0, atol=1e-6)
    packed.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(
        logits(auto_class("resnet").from_pretrained(tmp_path), "resnet"), expected, rtol=0, atol=1e-6
    )


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        batch = inputs_for("resnet")
        return {"pixel_values": batch["pixel_values"][i % 2], "labels": i % 2}


@pytest.mark.parametrize("bits", [16, 4])
def test_only_the_adapters_are_trained(bits, tmp_path):
    packed_model(adapter_bits=bits).save_pretrained(tmp_path / "packed")
    model = auto_class("resnet").from_pretrained(tmp_path / "packed")
    start = logits(model, "resnet")
    train_adapters_(model)
    torch.testing.assert_close(logits(model, "resnet"), start, rtol=0, atol=2e-3)  # float16 of the same factors
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.weight_adapter.{side}" for name in adapters(model) for side in ("left", "right")}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = TrainingArguments(
        tmp_path / "runs", max_steps=20, learning_rate=3e-3, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=10,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Samples())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[1] < 0.9 * losses[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in trained), key
    trainer.save_model(tmp_path / "tuned")
    tuned = auto_class("resnet").from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(tuned, "resnet"), logits(model, "resnet"))
    rows = report(tuned)["layers"]
    numbers = sum(a.left.numel() + a.right.numel() for a in adapters(tuned).values())
    plain = report(quantize(float_model("resnet"), R2QuantConfig("squant", 4, symmetric=False)))["layers"]
    assert sum(r["stored_bits"] for r in rows) - sum(r["stored_bits"] for r in plain) == 16 * numbers
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in trained)


def test_gradients_of_the_factors():
    model = packed_model(adapter_bits=16)
    train_adapters_(model)
    name, adapter = next(iter(adapters(model).items()))
    layer = model.get_submodule(name)
    (layer.weight * (direction := torch.randn_like(layer.weight))).sum().backward()
    left, right = adapter.left.half().float().detach(), adapter.right.half().float().detach()
    flat = direction.flatten(1) if adapter.kernel == "right" else direction.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(adapter.left.grad, flat @ right.T)
    torch.testing.assert_close(adapter.right.grad, left.T @ flat)


def test_training_needs_adapters():
    plain = quantize(float_model("resnet"), R2QuantConfig("nearest"))
    with pytest.raises(ValueError, match="no low-rank adapter to train: quantize it with method='cora'"):
        train_adapters_(plain)


def test_models_that_are_no_transformers_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    x = torch.randn(4, 3, 6, 6)
    config = R2QuantConfig("cora", 3, options={"budget": 0.5, "iters": 2, "progress": False})
    packed = quantize(model, config, [{"input": x}])
    other = quantize(model, config, [{"input": x + 1}])
    other.load_state_dict(packed.state_dict())
    train_adapters_(packed)
    packed(x).square().sum().backward()
    assert all(p.grad is not None for p in packed.parameters() if p.requires_grad)


def edited(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"]["layers"]["classifier.1"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(adapter_rank=7), r"layer 'classifier.1': weight_adapter.left has shape"),
        (lambda q: q.update(adapter_kernel="above"), "adapter_kernel must be one of right, left and adapter_rank"),
        (lambda q: q.update(adapter_bits=9), "adapter_bits must be an integer from 2 to 8, or 16"),
    ],
)
def test_configs_that_do_not_fit(change, message, tmp_path):
    packed_model(budget=0.9, ranks="equal").save_pretrained(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        auto_class("resnet").from_pretrained(tmp_path)


def test_an_adapter_that_the_checkpoint_lacks(tmp_path):
    quantize(float_model("resnet"), R2QuantConfig("nearest")).save_pretrained(tmp_path)
    edited(tmp_path, lambda q: q.update(adapter_rank=1))
    with pytest.raises(ValueError, match=r"the checkpoint lacks weight_adapter.left of layer 'classifier.1'"):
        auto_class("resnet").from_pretrained(tmp_path)
