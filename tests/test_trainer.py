"""`R2Trainer` in one process: accumulation, evaluation, optimizer groups, resuming, logs, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_r2 import (
    R2QuantConfig,
    R2Seq2SeqTrainer,
    R2Seq2SeqTrainingArguments,
    R2Trainer,
    R2TrainingArguments,
    RangeLoss,
    prepare,
)
from hf_r2.trainer import STATE_FILE, last_complete_checkpoint
from tests.workers.train_tiny import tiny_bert, tiny_pairs

ROOT = Path(__file__).parents[1]
# Trainer pins memory for a GPU that is not there when use_cpu is not set; nothing else is quiet about it either.
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}


def arguments(tmp_path, cls=R2TrainingArguments, **options):
    defaults = {
        "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd",
        "max_grad_norm": 0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return cls(output_dir=str(tmp_path), **{**QUIET, **defaults, **options})


def tiny_gpt2():
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def tiny_marian():
    torch.manual_seed(1)
    config = MarianConfig(
        vocab_size=50, decoder_vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0, activation_dropout=0,
        attention_dropout=0, pad_token_id=0, decoder_start_token_id=1, eos_token_id=2, max_position_embeddings=16,
    )  # fmt: skip
    return MarianMTModel(config)


def tiny_resnet():
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    for module in model.modules():  # batch statistics would differ between micro-batches, whatever the loss does
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
            module.training = False
    return model


def data_for(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "resnet":
        images = torch.randn(24, 3, 8, 8, generator=generator)
        return Dataset.from_list([{"pixel_values": x.tolist(), "labels": i % 2} for i, x in enumerate(images)])
    ids = torch.randint(3, 50, (24, 6), generator=generator).tolist()
    rows = [{"input_ids": i, "labels": sum(i) % 2 if kind == "bert" else i} for i in ids]
    if kind == "marian":  # the label smoother takes the labels away from the model, which made them from these
        rows = [{**row, "decoder_input_ids": [1, *row["labels"][:-1]]} for row in rows]
    return Dataset.from_list(rows)


MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2, "marian": tiny_marian, "resnet": tiny_resnet}


def run(tmp_path, kind="bert", trainer_class=R2Trainer, args_class=R2TrainingArguments, **options):
    model = MODELS[kind]()
    trainer = trainer_class(model=model, args=arguments(tmp_path, args_class, **options), train_dataset=data_for(kind))
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_weights_and_alphas_do_not_depend_on_the_accumulation(tmp_path, kind):
    reference = run(tmp_path, kind, range_weight=0.5)
    first = reference.state.log_history[0]
    # 1e-8 for one step in another order of summation; a loss off by the number of micro-batches would give 1e-2
    for batch, steps in ((4, 2), (1, 8)):
        other = run(
            tmp_path, kind, range_weight=0.5, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
        )
        for name, value in reference.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(other.range_loss.scalars, reference.range_loss.scalars, rtol=0, atol=1e-7)
        for key in ("task_loss", "range_loss", "loss"):
            assert float(other.state.log_history[0][key]) == pytest.approx(float(first[key]), rel=1e-4)
    assert float(first["loss"]) == pytest.approx(
        float(first["task_loss"]) + 0.5 * float(first["range_loss"]), rel=1e-4
    )


def test_one_step_is_the_gradient_of_task_plus_weighted_range_loss(tmp_path):
    model, rows = tiny_bert(), tiny_pairs()[:8]
    task = model(input_ids=torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["labels"])).loss
    range_loss = RangeLoss(model)
    (task + 0.7 * range_loss()).backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters()}
    alphas = range_loss.scalars.detach() - 0.03 * range_loss.scalars.grad
    trainer = run(tmp_path, max_steps=1, learning_rate=0.1, range_weight=0.7, range_lr=0.03)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(trainer.range_loss.scalars.detach(), alphas, rtol=0, atol=1e-6)


def test_swapping_the_class_name_trains_with_the_default_range_loss(tmp_path):
    trainer = run(tmp_path, args_class=TrainingArguments)
    assert trainer.range_loss.kind == "soft_min_max"
    assert trainer.range_weight == 0.01
    assert (trainer.range_loss.scalars != 0.1).all()
    assert {"task_loss", "range_loss", "range_over_std"} <= set(trainer.state.log_history[0])


def test_without_a_range_loss_it_is_the_trainer(tmp_path):
    for options in ({"range_weight": 0.0}, {"range_loss": "none"}):
        ours = run(tmp_path, **options)
        plain = run(tmp_path, trainer_class=Trainer, args_class=TrainingArguments)
        assert ours.range_loss is None
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=0)


def test_evaluation_sees_the_task_loss_alone(tmp_path):
    model, rows = tiny_bert(), tiny_pairs()
    trainer = R2Trainer(model=model, args=arguments(tmp_path, range_weight=5.0), eval_dataset=rows)
    model.eval()
    with torch.no_grad():
        task = model(input_ids=torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["labels"])).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task.item(), rel=1e-5)


def test_alpha_moves_under_adamw_and_is_not_decayed(tmp_path):
    trainer = run(tmp_path, optim="adamw_torch", learning_rate=5e-5, weight_decay=0.1, max_steps=10)
    assert (trainer.range_loss.scalars - 0.1 > 0.05).all()
    group = next(
        g for g in trainer.optimizer.param_groups if any(p is trainer.range_loss.scalars for p in g["params"])
    )
    assert group["weight_decay"] == 0
    assert group["lr"] == 0.01
    assert not any(p is trainer.range_loss.scalars for g in trainer.optimizer.param_groups[:-1] for p in g["params"])


def test_batch_norms_and_quantizers_are_not_decayed(tmp_path):
    model = prepare(tiny_resnet(), R2QuantConfig(method="dkm", weight_bits=2))
    first = next(m for m in model.modules() if hasattr(m, "weight_encoder"))
    first.weight_encoder.step = torch.nn.Parameter(torch.ones(1))  # such as a learned step size
    trainer = R2Trainer(model=model, args=arguments(tmp_path))
    names = trainer.get_decay_parameter_names(model)
    assert not [n for n in names if "normalization" in n or "weight_encoder" in n]
    assert [n for n in names if n.endswith("convolution.weight")]


def test_user_s_own_optimizer_gets_the_scalars(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = R2Trainer(
        model=model, args=arguments(tmp_path), train_dataset=tiny_pairs(), optimizers=(optimizer, None)
    )
    trainer.train()
    assert (trainer.range_loss.scalars != 0.1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["bf16", "gradient_checkpointing", "torch_compile"],
)
def test_modes_of_training(tmp_path, options):
    trainer = run(tmp_path, **options)
    assert len(trainer.range_loss.names) == 11
    assert (trainer.range_loss.scalars != 0.1).all()
    assert trainer.state.global_step == 3


def test_frozen_weights_are_left_alone(tmp_path):
    model = tiny_bert()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    before = model.bert.pooler.dense.weight.clone()
    trainer = R2Trainer(model=model, args=arguments(tmp_path), train_dataset=tiny_pairs())
    trainer.train()
    assert trainer.range_loss.names == ["classifier"]
    torch.testing.assert_close(model.bert.pooler.dense.weight, before, rtol=0, atol=0)


def test_label_smoothing_keeps_its_own_scaling(tmp_path):
    reference = run(tmp_path, "marian", label_smoothing_factor=0.1)
    other = run(
        tmp_path, "marian", label_smoothing_factor=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    for name, value in reference.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("args_class", [R2Seq2SeqTrainingArguments, Seq2SeqTrainingArguments])
def test_seq2seq_trainer(tmp_path, args_class):
    trainer = run(tmp_path, "marian", R2Seq2SeqTrainer, args_class, max_steps=1)
    assert trainer.range_loss.names[0] == "model.shared"


def test_arguments_from_the_command_line(tmp_path):
    line = [
        "--output_dir",
        str(tmp_path),
        "--range_loss",
        "margin",
        "--range_weight",
        "0.5",
        "--range_skip",
        "a*",
        "b",
    ]
    (args,) = HfArgumentParser(R2TrainingArguments).parse_args_into_dataclasses(line)
    assert (args.range_loss, args.range_weight, args.range_skip) == ("margin", 0.5, ["a*", "b"])
    assert args.range_trainable is None


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_strength_must_make_sense(tmp_path, weight):
    with pytest.raises(ValueError, match="range_weight must be a number >= 0"):
        R2TrainingArguments(output_dir=str(tmp_path), range_weight=weight)


@pytest.mark.parametrize(
    ("option", "value"),
    [("range_alpha", 3.0), ("range_trainable", False), ("range_units", "std"), ("range_dim", 2), ("range_skip", ["*query"]),
     ("range_loss", "margin"), ("range_lr", 0.1), ("range_weight", 0.5)],
)  # fmt: skip
def test_every_option_changes_the_result(tmp_path, option, value):
    plain, other = run(tmp_path, learning_rate=0.1), run(tmp_path, learning_rate=0.1, **{option: value})
    same_weights = all(
        torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True)
    )
    same_scalars = torch.equal(plain.range_loss.scalars, other.range_loss.scalars)
    assert not (same_weights and same_scalars)


def test_target_deployed_changes_the_result(tmp_path):
    runs = [run(tmp_path, "resnet", range_target=target, range_weight=1.0) for target in ("raw", "deployed")]
    norms = [r.model.resnet.embedder.embedder.normalization.weight for r in runs]
    assert not torch.equal(*norms)  # gamma is pulled only where the folded weight is measured


def in_process(out, **options):
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "tests.workers.train_tiny", str(out), json.dumps(options)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1}
    whole = in_process(tmp_path / "whole", **options)
    assert whole.returncode == 0, whole.stderr
    killed = in_process(tmp_path / "killed", kill_after_step=5, **options)
    assert killed.returncode == -signal.SIGKILL
    half = tmp_path / "killed" / "checkpoint-5"  # what a kill in the middle of saving leaves behind
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a file")
    assert last_complete_checkpoint(tmp_path / "killed").endswith("checkpoint-4")
    resumed = in_process(tmp_path / "killed", resume=True, **options)
    assert resumed.returncode == 0, resumed.stderr
    one, other = (load_file(tmp_path / name / "result-0.safetensors") for name in ("whole", "killed"))
    assert (one["alphas"] != 0.1).all()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)
    assert (tmp_path / "whole" / "checkpoint-6" / STATE_FILE).is_file()


def test_resuming_with_other_settings_is_refused(tmp_path):
    model = tiny_bert()
    R2Trainer(
        model=model,
        args=arguments(tmp_path, range_loss="none", save_strategy="steps", save_steps=3),
        train_dataset=tiny_pairs(),
    ).train()
    trainer = R2Trainer(model=tiny_bert(), args=arguments(tmp_path, max_steps=6), train_dataset=tiny_pairs())
    with pytest.raises(ValueError, match="it was written without a range loss"):
        trainer.train(resume_from_checkpoint=True)


def test_resume_without_any_checkpoint_is_refused(tmp_path):
    trainer = R2Trainer(model=tiny_bert(), args=arguments(tmp_path), train_dataset=tiny_pairs())
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_model_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no trainable linear, convolution or embedding weight"):
        R2Trainer(model=torch.nn.LayerNorm(4), args=arguments(tmp_path))


@pytest.mark.parametrize("name", ["range_compile", "range_trainable"])
def test_switches_are_true_false_or_none(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be true, false or None, got 'yes'"):
        arguments(tmp_path, **{name: "yes"})
    assert getattr(arguments(tmp_path, **{name: False}), name) is False


def test_split_weights_are_refused():
    from hf_r2.split_weights import refuse_split_weights

    class Stage3:
        zero_stage = 3

    class Fake:
        is_fsdp_enabled = False
        model = torch.nn.Linear(2, 2)

        class accelerator:
            class state:
                deepspeed_plugin = Stage3()

    with pytest.raises(ValueError, match="ZeRO-3"):
        refuse_split_weights(Fake, R2TrainingArguments())
    refuse_split_weights(Fake, R2TrainingArguments(range_loss="none"))  # plain training needs no whole weights
