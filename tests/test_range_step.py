"""`range_decoupled`: the range loss in steps of its own, behind those of the optimizer."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_r2 import R2Trainer, RangeLoss
from hf_r2.split_weights import refuse_split_weights
from tests.test_trainer import arguments, in_process, run
from tests.test_trainer_distributed import train
from tests.workers.train_tiny import tiny_bert, tiny_pairs

DECOUPLED = {"range_decoupled": True, "range_units": "relative", "range_alpha": 3.0}


def slow_pull(w, alpha):
    """Gradient of the width of w / std times the variance of w, with autograd in float64."""
    x = w.detach().double()
    x = x / x.std(correction=0)
    x.requires_grad_()
    width = (x * torch.softmax(alpha * x.flatten(), 0).view_as(x)).sum()
    width = width - (x * torch.softmax(-alpha * x.flatten(), 0).view_as(x)).sum()
    return torch.autograd.grad(width, x)[0] * w.detach().double().std(correction=0)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_step_is_the_optimizer_s_and_then_one_against_the_range(tmp_path, optim):
    """Clipping, which brings gradients of both down together, leaves the pull alone."""
    options = {"max_steps": 1, "optim": optim, "max_grad_norm": 1e-3}
    plain = run(tmp_path / "plain", range_loss="none", **options)
    trainer = run(tmp_path / "pulled", range_weight=0.5, **DECOUPLED, **options)
    layers = {name: weight.detach() for name, weight in trainer.range_loss.weights().items()}
    assert len(layers) > 5
    parameters = dict(plain.model.named_parameters())
    for name, weight in layers.items():
        stepped = parameters[f"{name}.weight"]
        expected = stepped.detach().double() - 0.5 * slow_pull(stepped, 3.0)
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=2e-7)
        assert (weight - stepped).abs().max() > 1e-3
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["task_loss"], abs=1e-6)  # the range loss is no part of it
    expected = RangeLoss(plain.model, units="relative", alpha=3.0)().item()
    assert log["range_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_outlier_gives_way_under_adam_only_where_it_is_pulled_beside_it(tmp_path):
    def trained(name, **options):
        model = tiny_bert()
        with torch.no_grad():
            model.bert.pooler.dense.weight[2, 3] = 5.0
            std = model.bert.pooler.dense.weight.std(correction=0)
        args = arguments(tmp_path / name, optim="adamw_torch", learning_rate=1e-4, max_steps=4, **options)
        R2Trainer(model=model, args=args, train_dataset=tiny_pairs()).train()
        return float(5.0 - model.bert.pooler.dense.weight.detach()[2, 3]), float(std)

    strong = {"range_units": "relative", "range_alpha": 3.0, "range_weight": 1e4}
    moved, std = trained("within", **strong)
    assert std > 0.3 and 3e-4 < moved < 4.1e-4  # four steps, each about the learning rate long
    moved, std = trained("beside", **strong | {"range_weight": 0.5, "range_decoupled": True})
    assert moved == pytest.approx(2.0 * std, rel=0.1)  # half a std, which falls meanwhile, in each of four


def test_the_pull_follows_the_schedule_and_every_n_steps_n_fold(tmp_path):
    """Without a task gradient: Adam's rate of 1e-30 moves nothing, and its schedule is 1, 2/3, 1/3."""
    start = tiny_bert().bert.pooler.dense.weight.detach()

    def pulled(name, **options):
        options = {
            "learning_rate": 1e-30,
            "optim": "adamw_torch",
            "range_loss": "l_inf",
            "range_weight": 1e-4,
        } | options
        trainer = run(tmp_path / name, range_decoupled=True, **options)
        return float((start - trainer.model.bert.pooler.dense.weight.detach()).abs().sum())

    assert pulled("constant") == pytest.approx(3e-4, rel=1e-3)
    assert pulled("linear", lr_scheduler_type="linear") == pytest.approx(2e-4, rel=1e-3)
    assert pulled("accumulated", gradient_accumulation_steps=4, per_device_train_batch_size=2) == pytest.approx(
        3e-4, 1e-3
    )
    assert pulled("every", range_every=2, max_steps=4) == pytest.approx(4e-4, rel=1e-3)
    assert pulled("at rest", learning_rate=0.0) == 0


def test_an_optimizer_of_the_user_s_own_is_followed_too(tmp_path):
    model, whole = tiny_bert(), tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = arguments(tmp_path, max_steps=1, range_weight=0.5, **DECOUPLED)
    R2Trainer(model=model, args=args, train_dataset=tiny_pairs(), optimizers=(optimizer, None)).train()
    plain = torch.optim.SGD(whole.parameters(), lr=0.1)
    args = arguments(tmp_path / "plain", max_steps=1, range_loss="none")
    R2Trainer(model=whole, args=args, train_dataset=tiny_pairs(), optimizers=(plain, None)).train()
    stepped = whole.bert.pooler.dense.weight.detach()
    expected = stepped.double() - 0.5 * slow_pull(stepped, 3.0)
    torch.testing.assert_close(model.bert.pooler.dense.weight.detach().double(), expected, rtol=0, atol=2e-7)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", **DECOUPLED}
    whole = in_process(tmp_path / "whole", **options)
    assert whole.returncode == 0, whole.stderr
    assert in_process(tmp_path / "killed", kill_after_step=3, **options).returncode == -signal.SIGKILL
    resumed = in_process(tmp_path / "killed", resume=True, **options)
    assert resumed.returncode == 0, resumed.stderr
    one, other = (load_file(tmp_path / name / "result-0.safetensors") for name in ("whole", "killed"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)


def test_two_processes_equal_one(tmp_path):
    options = {"train_sampling_strategy": "sequential", **DECOUPLED}
    (one,) = train(tmp_path / "one", 1, per_device_train_batch_size=8, **options)
    for two in train(tmp_path / "two", 2, per_device_train_batch_size=4, **options):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing learns but the weights: l_inf, or soft_min_max with range_trainable=False"),
        ({"range_loss": "margin"}, "nothing learns but the weights"),
        ({"range_units": "std", "range_trainable": True}, "nothing learns but the weights"),
        ({"range_units": "std", "range_target": "deployed"}, "range_target raw, got deployed"),
        ({"range_decoupled": "yes"}, "must be true or false, got 'yes'"),
        ({"range_loss": "l_1"}, "no range loss called 'l_1'"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{"range_decoupled": True, **options})


def test_without_a_range_loss_nothing_is_refused_nor_moved(tmp_path):
    plain, other = run(tmp_path / "a", range_loss="none"), run(tmp_path / "b", range_loss="none", range_decoupled=True)
    for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["DeepSpeed", "FSDP2"])
def test_where_the_weights_are_elsewhere_it_is_refused(tmp_path, where):
    class Plugin:
        zero_stage, fsdp_version, cpu_offload = 2, 2, None

    class Fake:
        args, model, is_fsdp_enabled = arguments(tmp_path), torch.nn.Linear(2, 2), where == "FSDP2"

        class accelerator:
            class state:
                deepspeed_plugin, fsdp_plugin = Plugin() if where == "DeepSpeed" else None, Plugin()

    refuse_split_weights(Fake, arguments(tmp_path, range_units="std"))
    with pytest.raises(ValueError, match=f"{where}.*range_decoupled|range_decoupled.*{where}"):
        refuse_split_weights(Fake, arguments(tmp_path, range_units="std", range_decoupled=True))
    refuse_split_weights(Fake, arguments(tmp_path, range_loss="none", range_decoupled=True))
