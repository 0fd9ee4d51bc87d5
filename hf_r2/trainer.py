"""`R2Trainer`: transformers' Trainer that adds the range loss in `compute_loss`, and nothing else that shows."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import ParallelMode

from hf_r2.layers import BATCH_NORMS
from hf_r2.losses import RangeLoss
from hf_r2.training_args import NO_LOSS, R2Arguments

logger = logging.getLogger(__name__)

STATE_FILE = "range_loss.safetensors"
# What the mixin stands before: either Trainer class; a type checker is told of the first.
AnyTrainer = Trainer if TYPE_CHECKING else object

QUANTIZER_PARTS = ("weight_encoder", "input_quantizer")


class R2TrainerMixin(AnyTrainer):
    """What `R2Trainer` adds to a Trainer class; all options come from `args`, so that constructors stay as they are.

    The loss trained on is task loss + range_weight x range loss; evaluation sees the task loss alone. The range loss
    counts once for each optimizer step, whatever the accumulation. `range_loss` is the `RangeLoss` (None without one).

    Raises ValueError at construction under DeepSpeed ZeRO-3 and FSDP, which split the weights that the loss must see
    whole, and for arguments that are not allowed.
    """

    range_loss: RangeLoss | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        options = self.args if isinstance(self.args, R2Arguments) else R2Arguments()
        _refuse_split_weights(self)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        by_smoother = self.label_smoother is not None  # it divides by num_items_in_batch itself
        if self.model_accepts_loss_kwargs and not by_smoother and not consumes_num_items(model):
            # Trainer takes **kwargs in `forward` as proof that the loss is divided by the accumulation steps already;
            # heads that ignore num_items_in_batch would train on a multiple (huggingface/transformers issue 47688).
            self.model_accepts_loss_kwargs = False
        self.range_weight = options.range_weight
        self._terms: dict[str, list[Tensor]] = {"task_loss": [], "range_loss": []}
        if options.range_loss != NO_LOSS and options.range_weight > 0:
            self.range_loss = RangeLoss(
                model,
                options.range_loss,
                alpha=options.range_alpha,
                trainable=options.range_trainable,
                units=options.range_units,
                target=options.range_target,
                dim=options.range_dim,
                skip=options.range_skip,
            )
            self.range_lr = options.range_lr
            if self.optimizer is not None:
                self._add_scalars(self.optimizer)

    def _add_scalars(self, optimizer: Any) -> None:
        """The learnable scalars as a group of their own: another learning rate, no decay."""
        if self.range_loss is not None and self.range_loss.trainable:
            self.range_loss.to(self.args.device)
            group = {"params": [self.range_loss.scalars], "lr": self.range_lr, "weight_decay": 0.0}
            optimizer.add_param_group(group)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of Trainer, with the learnable scalars of the range loss in a group of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            self._add_scalars(optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in Trainer, without batch-norm weights and parameters of quantizers: decay would shrink their scales."""
        norms = {n for n, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
        names = super().get_decay_parameter_names(model)
        return [
            n
            for n in names
            if n.rpartition(".")[0] not in norms and not any(p in QUANTIZER_PARTS for p in n.split("."))
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss plus, while training and at the last micro-batch of a step, `range_weight` x range loss."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and torch.is_grad_enabled():
            self._terms["task_loss"].append(loss.detach() / self._task_divisor(num_items_in_batch))
            if self.range_loss is not None and self.accelerator.sync_gradients:
                range_loss = self.range_loss(self._reached(loss))
                self._terms["range_loss"].append(range_loss.detach())
                # Trainer divides the sum by the accumulation steps unless the task loss was scaled already.
                steps = 1 if self._scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
                loss = loss + (self.range_weight * steps * range_loss).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer leaves the loss undivided, by the rule of its `training_step`."""
        known = getattr(self, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)

    def _task_divisor(self, num_items_in_batch: Tensor | int | None) -> float:
        """Turns the loss of a micro-batch into one whose mean over the micro-batches is the task loss of the step."""
        if not self._scaled(num_items_in_batch):
            return 1.0
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        return processes / self.current_gradient_accumulation_steps

    def _reached(self, loss: Tensor) -> set[str] | None:
        """Under DDP, the layers whose weight took part in this task loss; None for all.

        DDP marks the weights that the forward pass did not use as done; a gradient for them from the range loss would
        reach it a second time and end in "Expected to mark a variable ready only once".
        """
        if self.args.parallel_mode != ParallelMode.DISTRIBUTED or self.range_loss is None:
            return None
        leaves = _leaves(loss)
        return {name for name, weight in self.range_loss.weights().items() if id(weight) in leaves}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; the scalars of the range loss are cleared and kept positive here, as nobody else does.

        Trainer clears the gradients of the model, and the scalars are not part of it.
        """
        if self.range_loss is not None and self.range_loss.trainable:
            self.range_loss.project_()
            self.range_loss.zero_grad()
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds task loss, range loss (means since the last log) and mean range / std to the training logs."""
        if "loss" in logs:
            for name, values in self._terms.items():
                if values:
                    logs[name] = torch.stack(values).mean().item()
                    values.clear()
            if self.range_loss is not None:
                logs["range_over_std"] = self.range_loss.mean_range_over_std().item()
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in Trainer; `True` resumes from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.range_loss is not None and self.range_loss.trainable:
            self.range_loss.project_()
        return result

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.range_loss is not None and self.args.should_save:
            self.range_loss.project_()  # as the next step would before it uses them: resumed equals uninterrupted
            save_file({"scalars": self.range_loss.scalars.detach().cpu()}, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.range_loss is not None:
            file = Path(checkpoint) / STATE_FILE
            if not file.is_file():
                raise ValueError(
                    f"{checkpoint} holds no {STATE_FILE}: it was written without a range loss. Resume with --range_loss none, "
                    "or start a new run from its weights"
                )
            scalars = load_file(file)["scalars"]
            if scalars.shape != self.range_loss.scalars.shape:
                raise ValueError(
                    f"{file} holds {scalars.numel()} scalars, but this model has {self.range_loss.scalars.numel()} restricted "
                    "weights: the run was started with other settings"
                )
            with torch.no_grad():
                self.range_loss.scalars.copy_(scalars)
        super()._load_optimizer_and_scheduler(checkpoint)


class R2Trainer(R2TrainerMixin, Trainer):
    """Drop-in for `transformers.Trainer`, with plain `TrainingArguments` (default range loss) or `R2TrainingArguments`."""


class R2Seq2SeqTrainer(R2TrainerMixin, Seq2SeqTrainer):
    """Drop-in for `transformers.Seq2SeqTrainer`, with plain arguments or `R2Seq2SeqTrainingArguments`."""


def consumes_num_items(model: nn.Module) -> bool:
    """Whether the model's loss divides by `num_items_in_batch`: its forward names it, or passes its kwargs to the loss."""
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return False
    calls = [part.split(")")[0] for part in source.split("self.loss_function(")[1:]]
    return "num_items_in_batch" in source or any("**" in call for call in calls)


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint folder that was written to its end (Trainer writes trainer_state.json last).

    Raises ValueError where there is none.
    """
    folder = Path(output_dir)
    found = get_last_checkpoint(output_dir) if folder.is_dir() else None
    while found is not None:
        if (Path(found) / "trainer_state.json").is_file():
            return found
        logger.warning("%s was not written to its end; it is passed over", found)
        step = int(Path(found).name.rpartition("-")[2])
        older = [p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit() and int(p.name[11:]) < step]
        found = str(max(older, key=lambda p: int(p.name[11:]))) if older else None
    raise ValueError(f"no complete checkpoint in {output_dir}; train without resume_from_checkpoint")


def _leaves(loss: Tensor) -> set[int]:
    """Ids of the parameters that the graph of `loss` ends in."""
    seen, found = set(), set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(getattr(node, "variable")))  # noqa: B009  # of AccumulateGrad alone
        stack.extend(next_node for next_node, _ in node.next_functions)
    return found


def _refuse_split_weights(trainer: Any) -> None:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("R2Trainer cannot see whole weights under DeepSpeed ZeRO-3; use ZeRO-2, ZeRO-1 or plain DDP")
    if getattr(trainer, "is_fsdp_enabled", False):
        raise ValueError("R2Trainer does not support FSDP yet: the range of a weight needs all of it; use DDP")
