"""`R2Trainer` where scripts use `Trainer` in other ways: model_init, their own schedulers, heads of every kind, old folders."""

import dataclasses
import json

import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel

from hf_r2 import R2Trainer, RangeLoss
from hf_r2.loss_division import consumes_num_items
from hf_r2.trainer import last_complete_checkpoint
from hf_r2.training_args import R2Arguments
from tests.models import MODELS
from tests.test_trainer import arguments, run, tiny_gpt2
from tests.workers.train_tiny import tiny_bert, tiny_pairs


def tiny_vit(**options):
    torch.manual_seed(1)
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def assert_same_weights(one, other, atol=1e-6):
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=0, atol=atol, msg=name)


def test_model_init_restricts_the_model_that_is_trained(tmp_path):
    """`Trainer.train` makes a new model; a range loss on the one from the constructor would restrict nothing."""
    plain = run(tmp_path, range_weight=0.5)
    trainer = R2Trainer(
        model_init=lambda: tiny_bert(), args=arguments(tmp_path, range_weight=0.5), train_dataset=tiny_pairs(24)
    )
    trainer.train()
    parameters = {id(p) for p in trainer.model.parameters()}
    assert all(id(weight) in parameters for weight in trainer.range_loss.weights().values())
    torch.testing.assert_close(trainer.range_loss.scalars, plain.range_loss.scalars, rtol=0, atol=0)
    assert_same_weights(plain, trainer, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: tf.get_linear_schedule_with_warmup(o, 1, 10),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)],
            [2],
        ),
    ],
    ids=["linear_with_warmup", "step", "plateau", "sequential"],
)
def test_user_s_own_scheduler(tmp_path, make):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = R2Trainer(
        model=model, args=arguments(tmp_path), train_dataset=tiny_pairs(), optimizers=(optimizer, make(optimizer))
    )
    trainer.train(None, None)  # positional arguments, as Trainer takes them
    assert (trainer.range_loss.scalars != 0.1).all()
    first, ours = (group["lr"] for group in trainer.optimizer.param_groups)
    assert ours / 0.01 == pytest.approx(first / 0.1)


def test_a_scheduler_that_takes_no_more_groups_is_refused(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pair = (optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10))
    with pytest.raises(ValueError, match="OneCycleLR cannot take the range loss's scalars"):
        R2Trainer(model=model, args=arguments(tmp_path), optimizers=pair)
    assert R2Trainer(model=model, args=arguments(tmp_path, range_trainable=False), optimizers=pair).range_loss


# Which losses divide by num_items_in_batch, read in the sources of transformers 5.23.
CONSUMERS = {"gpt2"}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_heads_that_ignore_the_number_of_items(name):
    assert consumes_num_items(MODELS[name][0]()) == (name in CONSUMERS)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [("single_label_classification", True), ("multi_label_classification", False), (None, False)],
)
def test_heads_whose_loss_depends_on_the_problem(problem, expected):
    assert consumes_num_items(tiny_vit(problem_type=problem)) is expected


def test_heads_without_source_or_loss_are_taken_to_ignore_it():
    assert not consumes_num_items(torch.nn.Linear(2, 2))
    namespace = {}
    exec("def forward(self, x, num_items_in_batch=None): return x", namespace)  # no source to read
    assert not consumes_num_items(type("Sourceless", (torch.nn.Module,), namespace)())


def test_the_number_of_items_is_told_from_prose_and_found_behind_decorators():
    class Prose(torch.nn.Module):
        def forward(self, x):
            """Does not use num_items_in_batch."""
            return x  # nor does self.loss_function(x, **kwargs)

    class Decorated(torch.nn.Module):
        @tf.utils.can_return_tuple
        def forward(self, x, **kwargs):
            return self.loss_function(x.view(-1), self.config.get_text_config().vocab_size, **kwargs)

        loss_function = staticmethod(tf.loss.loss_utils.ForCausalLMLoss)

    assert not consumes_num_items(Prose())
    assert consumes_num_items(Decorated())


def test_multi_label_loss_does_not_depend_on_the_accumulation(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    labels = torch.randint(2, (24, 3), generator=generator).float()
    rows = Dataset.from_dict({"pixel_values": images.tolist(), "labels": labels.tolist()})
    trainers = []
    for batch, steps in ((8, 1), (2, 4)):
        options = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        trainer = R2Trainer(
            model=tiny_vit(problem_type="multi_label_classification"), args=options, train_dataset=rows
        )
        trainer.train()
        trainers.append(trainer)
    assert_same_weights(*trainers)


def test_tokens_count_alike_where_micro_batches_have_different_numbers_of_them(tmp_path):
    ids = torch.randint(3, 50, (24, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list(
        [{"input_ids": row, "labels": row[: 2 + i % 5] + [-100] * (4 - i % 5)} for i, row in enumerate(ids)]
    )
    trainers = []
    for batch, steps in ((8, 1), (2, 4)):
        options = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        trainer = R2Trainer(model=tiny_gpt2(), args=options, train_dataset=rows)
        trainer.train()
        trainers.append(trainer)
    assert_same_weights(*trainers)
    one, other = (float(t.state.log_history[0]["task_loss"]) for t in trainers)
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("find_unused", [False, True])
def test_range_loss_leaves_out_only_what_ddp_looks_for(tmp_path, find_unused):
    model = tiny_bert()
    model.spare = torch.nn.Linear(16, 16)
    trainer = R2Trainer(model=model, args=arguments(tmp_path))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
        loss = wrapped(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([1])).loss
        reached = trainer._reached(wrapped, loss)
    finally:
        torch.distributed.destroy_process_group()
    assert reached == ({*trainer.range_loss.names} - {"spare"} if find_unused else None)
    assert trainer._reached(model, loss) is None


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["gradient_checkpointing", "torch_compile"],
)
def test_modes_that_compute_the_same_give_the_same(tmp_path, options):
    plain, other = run(tmp_path, range_weight=0.5), run(tmp_path, range_weight=0.5, **options)
    assert_same_weights(plain, other)
    torch.testing.assert_close(other.range_loss.scalars, plain.range_loss.scalars, rtol=0, atol=1e-6)


def test_terms_are_not_hoarded_where_nothing_is_logged(tmp_path):
    trainer = run(tmp_path, logging_strategy="no", gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert {name: count for name, (_, count) in trainer._terms.items()} == {"task_loss": 6, "range_loss": 3}
    assert all(total.dim() == 0 for total, _ in trainer._terms.values())


def test_modules_called_encoder_are_decayed(tmp_path):
    model = tiny_bert()
    names = R2Trainer(model=model, args=arguments(tmp_path)).get_decay_parameter_names(model)
    assert "bert.encoder.layer.0.attention.self.query.weight" in names


def test_every_argument_says_what_it_is_for():
    fields = dataclasses.fields(R2Arguments)
    assert {f.name for f in fields} >= {"range_loss", "range_weight", "range_alpha", "range_lr", "range_skip"}
    assert all(len(f.metadata["help"]) > 20 for f in fields)


def test_a_checkpoint_whose_state_is_cut_off_is_passed_over(tmp_path):
    for step, text in ((2, "{}"), (9, "{}"), (10, '{"global_')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(str(tmp_path)).endswith("checkpoint-9")


def test_an_old_checkpoint_does_not_vouch_for_one_half_written_over_it(tmp_path):
    old = tmp_path / "checkpoint-3"
    old.mkdir()
    (old / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    trainer = R2Trainer(
        model=tiny_bert(),
        args=arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=tiny_pairs(),
    )

    def die(*args, **kwargs):
        raise OSError("No space left on device")

    trainer._save_optimizer_and_scheduler = die
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_complete_checkpoint(str(tmp_path))


def test_range_loss_is_the_trainer_s_and_not_the_model_s(tmp_path):
    trainer = run(tmp_path)
    assert isinstance(trainer.range_loss, RangeLoss)
    assert not [name for name in trainer.model.state_dict() if "scalars" in name]
