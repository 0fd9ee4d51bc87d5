"""The gradient of the range loss added to `.grad` at the end of the backward pass equals the one that autograd adds."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_r2 import R2Trainer, R2TrainingArguments, RangeLoss, range_compiled
from hf_r2.range_forms import CHUNK
from tests.reference.range_loss import soft_min_max as slow
from tests.workers.train_tiny import tiny_bert, tiny_pairs


def conv_bn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        model[1].running_var.copy_(torch.tensor([0.01, 1.0, 4.0, 0.5]))
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"kind": "margin"}, {"kind": "l_inf"}, {"units": "std"}, {"target": "deployed"}]
)
@pytest.mark.parametrize("held", [False, True])
def test_backward_adds_what_autograd_would(options, held):
    """Weights of equal size are stacked, a large one is not, one in another memory format has no flat gradient."""
    model = nn.Sequential(conv_bn(), nn.Linear(7, 9), nn.Linear(9, 7), nn.Linear(300, 300)).double()
    with torch.no_grad():
        model[0][0].weight.data = model[0][0].weight.data.to(memory_format=torch.channels_last)
    weights = [p for p in model.parameters() if p.dim() > 1]
    loss = RangeLoss(model, **options).double()
    if loss.kind == "margin":
        loss.scalars.data.mul_(0.7)
    results = []
    for direct in (False, True):
        torch.manual_seed(2)
        for p in (*model.parameters(), loss.scalars):
            p.grad = torch.randn_like(p) if held else None
        value = loss(into_grad=direct)
        (0.3 * value).backward()
        grads = [None if p.grad is None else p.grad.clone() for p in (*model.parameters(), loss.scalars)]
        results.append((value.detach(), grads))
    assert all(w.grad.abs().sum() > 0 for w in weights)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backward_adds_to_half_precision(dtype):
    model = nn.Linear(40, 30, bias=False).to(dtype)
    loss = RangeLoss(model, alpha=3.0)
    (2 * loss(into_grad=True)).backward()
    first, expected = model.weight.grad.clone(), model.weight.detach().float().requires_grad_()
    assert first.dtype == dtype
    (2 * slow(expected, torch.tensor(3.0))).backward()
    torch.testing.assert_close(first.float(), expected.grad, rtol=1e-2, atol=1e-6)
    (2 * loss(into_grad=True)).backward()
    torch.testing.assert_close(model.weight.grad, 2 * first, rtol=1e-2, atol=1e-6)


def both_ways(model, act, **options):
    """What `act(model, loss)` returns with the gradient left to autograd, and put into `.grad`."""
    found = []
    for into_grad in (False, True):
        model.zero_grad()
        loss = RangeLoss(model, **options)
        found.append(act(model, loss(into_grad=into_grad)))
    return found


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_with_a_task_loss_in_one_graph():
    model, x = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 5)), torch.randn(4, 200)

    def act(model, loss):
        total = model(x).square().mean() + 0.3 * loss
        (total / 2).backward(retain_graph=True)
        total.backward()
        return gradients(model)

    plain, into = both_ways(model, act, alpha=2.0)
    torch.testing.assert_close(into, plain, rtol=1e-5, atol=1e-7)


def test_autograd_grad_gets_the_gradient_and_leaves_grad_alone():
    model = nn.Linear(30, 20)
    plain, into = both_ways(model, lambda model, loss: torch.autograd.grad(loss, model.weight)[0])
    assert plain.abs().sum() > 0
    torch.testing.assert_close(into, plain)
    assert model.weight.grad is None


def test_backward_for_some_inputs_touches_no_others():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30))

    def act(model, loss):
        loss.backward(inputs=[model[0].weight])
        return model[0].weight.grad, model[1].weight.grad

    plain, into = both_ways(model, act)
    assert plain[1] is None and into[1] is None
    torch.testing.assert_close(into[0], plain[0])


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_weight_see_the_whole_gradient(hook):
    model, seen = nn.Linear(30, 20), []
    handle = getattr(model.weight, hook)(lambda t: seen.append((t if t.grad is None else t.grad).clone()))
    both_ways(model, lambda model, loss: (loss + model.weight.sum()).backward())
    handle.remove()
    assert len(seen) == 2
    assert (seen[0] - 1).abs().sum() > 0
    torch.testing.assert_close(seen[1], seen[0])


def test_a_graph_of_the_gradient_is_refused_as_ever():
    model = nn.Linear(30, 20)
    scale = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(scale * RangeLoss(model)(into_grad=True), model.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_sparse_gradient_becomes_a_dense_one():
    table = nn.Embedding(40, 8, sparse=True)
    plain, into = both_ways(
        table, lambda table, loss: [(table(torch.tensor([3])).sum() + loss).backward(), gradients(table)][1]
    )
    torch.testing.assert_close(into, plain)
    assert into[0][3].sum() > 7


@pytest.mark.parametrize("kind", ["soft_min_max", "margin", "l_inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 64, 4, 4)])
def test_no_second_gradient_is_made_beside_an_existing_one(kind, dtype, shape):
    model = nn.Linear(shape[1], shape[0], bias=False) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
    model = model.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    w = model.weight
    w.grad = torch.zeros_like(w)
    place, range_loss = w.grad.data_ptr(), RangeLoss(model, kind)
    if kind == "margin":
        range_loss.scalars.data *= 0.9
    with Largest() as largest:
        range_loss(into_grad=True).backward()
    assert w.grad.data_ptr() == place and w.grad.any() and w.grad.dtype == dtype
    assert largest.numel <= 3 * CHUNK < w.numel()
    again = w.detach().contiguous().clone().requires_grad_()
    model.weight = nn.Parameter(again)
    fresh = RangeLoss(model, kind)
    fresh.scalars.data.copy_(range_loss.scalars.data)
    fresh().backward()
    torch.testing.assert_close(w.grad, model.weight.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-12)


def test_nothing_is_lost_where_saved_tensors_are_copied():
    model = nn.Linear(30, 20, bias=False)
    loss = RangeLoss(model, alpha=3.0)
    loss().backward()
    expected, model.weight.grad = model.weight.grad, None
    with torch.autograd.graph.save_on_cpu():
        loss(into_grad=True).backward()
    torch.testing.assert_close(model.weight.grad, expected)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that operations make."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = not func.is_view and "out" not in (kwargs or {}) and not any(out is given for given in args)
        if isinstance(out, torch.Tensor) and made:
            self.numel = max(self.numel, out.numel())
        return out


def trained(tmp_path, **options):
    torch.manual_seed(0)
    defaults = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "sgd",
    }
    defaults |= {"max_steps": 4, "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 8}
    args = R2TrainingArguments(**{**defaults, **options})
    trainer = R2Trainer(model=tiny_bert(), args=args, train_dataset=tiny_pairs())
    trainer.train()
    return trainer


def test_every_second_step_pulls_twice_as_hard(tmp_path):
    trainer = trained(tmp_path, range_every=2, range_weight=0.25)
    logs = trainer.state.log_history[:4]
    assert ["range_loss" in log for log in logs] == [True, False, True, False]
    for log, weight in zip(logs, (0.5, 0, 0.5, 0), strict=True):
        added = float(log["loss"]) - float(log["task_loss"])
        assert added == pytest.approx(weight * float(log.get("range_loss", 0)), abs=2e-3)
    # alone in the loss, the pull of one step of two is that of two steps on weights that hardly move
    results = [trained(tmp_path, range_every=every, learning_rate=1e-5).range_loss.scalars for every in (1, 2)]
    moved = [(result.detach() - 0.1) for result in results]
    assert moved[0].abs().min() > 1e-4
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_one_call_for_each_optimizer_step_whatever_the_accumulation(tmp_path, monkeypatch, steps):
    calls, forward = [], RangeLoss.forward
    monkeypatch.setattr(RangeLoss, "forward", lambda self, *a, **k: calls.append(k) or forward(self, *a, **k))
    trained(tmp_path, gradient_accumulation_steps=steps, per_device_train_batch_size=8 // steps, max_steps=3)
    assert calls == [{"into_grad": True, "weights": None}] * 3


def test_into_grad_trains_as_autograd_does(tmp_path, monkeypatch):
    options = {"range_weight": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    into, forward = trained(tmp_path, **options), RangeLoss.forward
    monkeypatch.setattr(RangeLoss, "forward", lambda self, only=None, **_: forward(self, only))
    plain = trained(tmp_path, **options)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(into.model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(into.range_loss.scalars, plain.range_loss.scalars, rtol=0, atol=1e-6)


def test_a_gradient_scaler_of_float16_scales_it_too(tmp_path):
    trainer = R2Trainer(model=tiny_bert(), args=R2TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    trainer.current_gradient_accumulation_steps = 1
    inputs = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([1])}
    grads = []
    for scale in (1.0, 1024.0):
        trainer.model.train().zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(trainer.compute_loss(trainer.model, inputs)).backward()
        grads.append([p.grad.clone() for p in trainer.range_loss.weights().values()])
    torch.testing.assert_close(grads[1], [1024 * g for g in grads[0]], rtol=1e-5, atol=1e-6)


def test_only_long_runs_are_compiled(tmp_path):
    for options, compiled in (({}, False), ({"range_compile": True}, True), ({"max_steps": 5000}, True)):
        args = R2TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
        trainer = R2Trainer(model=tiny_bert(), args=args)
        trainer.state.max_steps = max(args.max_steps, 1999)
        trainer._choose_loops(trainer.range_loss)
        assert trainer.range_loss.compiled is (compiled and range_compiled.compiler_found())


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_every_takes_whole_numbers(tmp_path, value):
    with pytest.raises(ValueError, match="range_every must be an integer of at least 1"):
        R2TrainingArguments(output_dir=str(tmp_path), range_every=value)
