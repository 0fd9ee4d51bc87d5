"""`R2Trainer` under FSDP2 on gloo processes equals one process, and resumes on another number of them."""

import pytest
import torch

from hf_r2 import R2QuantConfig, R2Trainer, R2TrainingArguments, prepare
from hf_r2.split_weights import refuse_split_weights
from tests.test_trainer_distributed import train
from tests.workers.train_tiny import tiny_bert

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}
# 51 rows and matrices of 2 rows: shards of 26 and 25, of 1 and 1; on three processes of 17, and of 1, 1 and 0
COMMON = {"train_sampling_strategy": "sequential", "words": 51}


@pytest.mark.parametrize(
    "options",
    [
        {"range_alpha": 300.0, "range_trainable": False},  # exponentials that overflow: by the bounds of all shards
        {"range_loss": "l_inf"},
        {"range_loss": "margin", "optim": "adamw_torch"},
        # pulls of 1 / std, with their rounding, are fifty times those of the other units
        {"range_units": "std", "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
    ],
)
def test_shards_on_two_processes_equal_one(tmp_path, options):
    batch = 8 // options.get("gradient_accumulation_steps", 1)
    options = COMMON | options
    (one,) = train(tmp_path / "one", 1, per_device_train_batch_size=batch, **options)
    for two in train(tmp_path / "two", 2, per_device_train_batch_size=batch // 2, **FSDP, **options):
        for name, value in one.items():
            relative = (
                1e-6 if name.startswith("log.") else 0
            )  # logged losses are up to 60: a float32 of 60 is good to 4e-6
            torch.testing.assert_close(two[name], value, rtol=relative, atol=2e-6, msg=name)


def test_resumed_on_three_processes_equals_uninterrupted(tmp_path):
    options = COMMON | {"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = train(tmp_path / "two", 2, per_device_train_batch_size=6, **FSDP, **options)
    resume = {"resume": str(tmp_path / "two" / "checkpoint-2")}
    resumed = train(tmp_path / "three", 3, per_device_train_batch_size=4, **FSDP, **options, **resume)
    for name, value in straight[0].items():
        for other in (*straight, *resumed):
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-6, msg=name)
    assert (straight[0]["alphas"] - 0.1).abs().min() > 1e-2


class Plugin:
    """What accelerate's plugin says of FSDP."""

    fsdp_version, cpu_offload = 2, None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1; set version 2"),
        ({"range_dim": 2}, "does not take range_dim > 1 under FSDP2"),
        ({"range_target": "deployed"}, "does not take range_target='deployed' under FSDP2"),
        ({"range_units": "relative"}, "does not take range_units='relative' under FSDP2"),
        ({"torch_compile": True}, "does not take torch_compile under FSDP2"),
        ({"prepared": True}, "prepared \\(quantized\\) models under DDP"),
        ({}, None),
        ({"fsdp_version": 1, "range_loss": "none"}, None),  # plain training
        ({"fsdp_version": 1, "range_weight": 0.0}, None),
        ({"torch_compile": True, "fp16": True, "range_loss": "none"}, None),
        ({"prepared": True, "range_loss": "none"}, "prepared \\(quantized\\) models under DDP"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(tmp_path, options, message):
    trainer = R2Trainer(model=tiny_bert(), args=R2TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    plugin = Plugin()
    plugin.fsdp_version = options.pop("fsdp_version", 2)
    if options.pop("prepared", False):
        prepare(trainer.model, R2QuantConfig(method="lsq", weight_bits=4))
    for name, value in options.items():
        setattr(trainer.args, name, value)
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.__dict__["fsdp_plugin"] = plugin
    try:
        if message is None:
            refuse_split_weights(trainer, trainer.args)
        else:
            with pytest.raises(ValueError, match=message):
                refuse_split_weights(trainer, trainer.args)
    finally:
        del trainer.accelerator.state.__dict__["fsdp_plugin"]
