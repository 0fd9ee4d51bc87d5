"""`R2Trainer`: transformers' Trainer that adds the range loss in `compute_loss`, and nothing else that shows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import ParallelMode

from hf_r2.layers import BATCH_NORMS
from hf_r2.leaves import leaves
from hf_r2.loss_division import consumes_num_items
from hf_r2.losses import RangeLoss
from hf_r2.optimizer_groups import is_quantizer_parameter, make_room, split_quantizers_
from hf_r2.range_step import pull_
from hf_r2.scalar_optimizer import ScalarOptimizer
from hf_r2.split_weights import refuse_split_weights, split_
from hf_r2.training_args import R2Arguments

logger = logging.getLogger(__name__)

COMPILE_FROM = (
    2000  # range losses in a run from which compiling them pays: it takes up to a minute, and saves 0.03 s each
)

STATE_FILE = "range_loss.safetensors"
# What the mixin stands before: either Trainer class; a type checker is told of the first.
AnyTrainer = Trainer if TYPE_CHECKING else object


class R2TrainerMixin(AnyTrainer):
    """What `R2Trainer` adds to a Trainer class; all options come from `args`, so that constructors stay as they are.

    The loss trained on is task loss + range_weight x range loss; evaluation sees the task loss alone. The range loss
    is computed once for each optimizer step, or each `range_every` of them with as many times the weight, whatever the
    accumulation. `range_loss` is the `RangeLoss` (None without one). With `range_decoupled` it is no part of the loss: behind
    each step of the optimizer the weights take one against their range.

    Under FSDP2 the loss is that of the whole weights, and the learnable scalars, the same in all processes, have an
    optimizer of their own. Raises ValueError at construction under DeepSpeed ZeRO-3 and FSDP1, which hide the weights from
    it, for what it does not take under FSDP2 (plain training, with range_loss="none", takes all), and for arguments that
    are not allowed.
    """

    range_loss: RangeLoss | None = None
    scalar_optimizer: ScalarOptimizer | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = self._bare_model()
        by_smoother = self.label_smoother is not None  # it divides by num_items_in_batch itself
        if self.model_accepts_loss_kwargs and not by_smoother and not consumes_num_items(model):
            # Trainer takes **kwargs in `forward` as proof that the loss is divided by the accumulation steps already;
            # heads that ignore num_items_in_batch would train on a multiple (huggingface/transformers issue 47688).
            self.model_accepts_loss_kwargs = False
        self._terms: dict[str, tuple[Tensor | float, int]] = {}  # name: sum since the last log, and of how many
        self._restrict(model)
        if self.optimizer is not None:
            self._join(self.optimizer, self.lr_scheduler)

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _restrict(self, model: nn.Module) -> None:
        """Makes `range_loss` anew, on the weights of `model`, as `args` say now."""
        options = self.args if isinstance(self.args, R2Arguments) else R2Arguments()
        options.check_range_arguments()  # a hyperparameter search sets them after construction
        refuse_split_weights(self, options)
        self.range_weight, self.range_lr, self.range_loss = options.range_weight, options.range_lr, None
        self.quantizer_lr, self.range_every = options.quantizer_lr, options.range_every
        self.range_compile, self.range_decoupled = options.range_compile, options.range_decoupled
        if options.has_range_loss:
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

    def _join(self, optimizer: Any, scheduler: Any = None) -> None:
        """Has the range loss take part in the steps of `optimizer`: its scalars, or where it is decoupled its own steps."""
        self._add_scalars(optimizer, scheduler)
        if self.range_loss is not None and self.range_decoupled:
            optimizer.register_step_post_hook(lambda stepped, *_: self._pull(stepped))

    def _pull(self, optimizer: torch.optim.Optimizer) -> None:
        range_loss = self._due()
        if range_loss is not None:
            strength = self.range_every * self.range_weight
            self._note("range_loss", pull_(range_loss, optimizer, strength, self.args.learning_rate))

    def _due(self) -> RangeLoss | None:
        """The range loss, where this step is one that computes it."""
        if self.range_loss is None or self.state.global_step % self.range_every:
            return None
        self._choose_loops(self.range_loss)
        return self.range_loss

    def _add_scalars(self, optimizer: Any, scheduler: Any = None) -> None:
        """The learnable scalars as a group of their own: another learning rate, no decay."""
        if self.range_loss is not None and self.range_loss.trainable:
            self.range_loss.to(self.args.device)
            if self.is_fsdp_enabled:
                # where only the first process has read the weights, only that one has margins
                broadcast(self.range_loss.scalars.data)
                self.scalar_optimizer = ScalarOptimizer(self.range_loss.scalars, optimizer, self.range_lr)
                return
            group = {"params": [self.range_loss.scalars], "lr": self.range_lr, "weight_decay": 0.0}
            if scheduler is not None:
                group |= {"initial_lr": self.range_lr}
                make_room(scheduler, self.range_lr)
            optimizer.add_param_group(group)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of Trainer, with the learnable scalars of the range loss in a group of their own.

        So are steps and clips of quantizers, if `quantizer_lr` asks for a rate of their own.
        """
        fresh = self.optimizer is None
        if fresh and self.model_init is not None:
            self._restrict(self._bare_model())  # `train` has put a new model in the place of the one restricted so far
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            if self.quantizer_lr is not None:
                split_quantizers_(optimizer, self._bare_model(), self.quantizer_lr)
            self._join(optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in Trainer, without batch-norm weights and parameters of quantizers: decay would shrink their scales."""
        norms = {n for n, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
        names = super().get_decay_parameter_names(model)
        return [n for n in names if n.rpartition(".")[0] not in norms and not is_quantizer_parameter(n)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss plus, while training and at the last micro-batch of a step, `range_weight` x range loss."""
        weights = self._weights(model)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and torch.is_grad_enabled():
            self._note("task_loss", loss.detach().mean() / self._task_divisor(num_items_in_batch))
            if self.accelerator.sync_gradients:
                # Trainer divides the sum by the accumulation steps unless the task loss was scaled already.
                steps = 1 if self._scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
                loss = loss + sum((steps * term).to(loss.device) for term in self._restrictions(model, loss, weights))
        return (loss, outputs) if return_outputs else loss

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter] | None:
        """Under FSDP the split weights, which the forward pass is about to replace by whole ones; None for those in place."""
        if not self.is_fsdp_enabled or self.range_loss is None or not model.training:
            return None
        split_(model, self.range_loss.weights())
        return self.range_loss.weights()

    def _restrictions(self, model: nn.Module, loss: Tensor, weights: dict[str, nn.Parameter] | None) -> list[Tensor]:
        """What is added to the task loss once for each optimizer step."""
        terms = []
        due = None if self.range_decoupled else self._due()
        if due is not None:
            # elsewhere somebody waits for the gradients of the weights while the backward pass is going on
            alone = self.accelerator.distributed_type == DistributedType.NO
            range_loss = due(self._reached(model, loss), into_grad=alone, weights=weights)
            self._note("range_loss", range_loss.detach())
            terms.append(self.range_every * self.range_weight * range_loss)
        penalties = [m.penalty() for m in model.modules() if callable(getattr(type(m), "penalty", None))]  # type: ignore[operator]
        penalties = [penalty for penalty in penalties if penalty is not None]
        if penalties:
            terms.append(torch.stack(penalties).sum())
            self._note("clip_penalty", terms[-1].detach())
        return terms

    def _choose_loops(self, range_loss: RangeLoss) -> None:
        """Has the range loss compiled, if asked to or in a run long enough; once the number of steps is known."""
        if self.range_compile is None:
            self.range_compile = self.state.max_steps - self.state.global_step >= COMPILE_FROM * self.range_every
        if self.range_compile and not range_loss.compiled:
            range_loss.use_compiler(True)

    def _note(self, name: str, value: Tensor) -> None:
        """Adds to the running sum of a term, on its device: reading it here would wait for the device at every step."""
        total, count = self._terms.get(name, (0.0, 0))
        self._terms[name] = (total + value, count + 1)

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

    def _reached(self, model: nn.Module, loss: Tensor) -> set[str] | None:
        """Under a DDP that looks for unused weights, the layers whose weight took part in this task loss; None for all.

        Such a DDP marks the weights that the forward pass did not use as done; a gradient for them from the range loss
        would reach it a second time and end in "Expected to mark a variable ready only once". One that does not look
        (as with gradient checkpointing, where the graph may hide the weights too) waits for a gradient of every weight.
        """
        wrapped = getattr(model, "_orig_mod", model)
        if self.range_loss is None or not isinstance(wrapped, DistributedDataParallel):
            return None
        if not wrapped.find_unused_parameters:
            return None
        found = leaves(loss)
        return {name for name, weight in self.range_loss.weights().items() if id(weight) in found}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; the scalars of the range loss are cleared, kept positive and averaged here, as nobody else does.

        Trainer clears the gradients of the model, and DDP averages them; the scalars are part of neither.
        """
        scalars = self.range_loss.scalars if self.range_loss is not None and self.range_loss.trainable else None
        if self.range_loss is not None and scalars is not None:
            self.range_loss.project_()
            self.range_loss.zero_grad()
        loss = super().training_step(*args, **kwargs)
        if scalars is not None and scalars.grad is not None and self._distributed():
            # the processes may have reached different layers, and would drift apart
            scalars.grad = self._mean_over_processes(scalars.grad)
        return loss

    def _distributed(self) -> bool:
        return self.args.parallel_mode == ParallelMode.DISTRIBUTED

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        mean = self.accelerator.reduce(value, reduction="mean")
        assert isinstance(mean, Tensor)  # a tensor was given
        return mean

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds task loss, range loss (means since the last log) and mean range / std to the training logs."""
        if "loss" in logs and "learning_rate" in logs:  # Trainer's own line, which every process comes to
            for name, (total, count) in self._terms.items():
                mean = torch.as_tensor(total / count)
                logs[name] = (self._mean_over_processes(mean) if self._distributed() else mean).item()
            self._terms.clear()
            _check_prepared(self._bare_model())
            if self.range_loss is not None:
                logs["range_over_std"] = self.range_loss.mean_range_over_std().item()
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; `True` resumes from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.range_loss is not None and self.range_loss.trainable:
            self.range_loss.project_()
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # of an earlier run into this folder: it would vouch for a checkpoint that is only half overwritten
            stale = (
                Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}" / TRAINER_STATE_NAME
            )
            stale.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.range_loss is not None and self.args.should_save:
            self.range_loss.project_()  # as the next step would before it uses them: resumed equals uninterrupted
            beside = {} if self.scalar_optimizer is None else self.scalar_optimizer.state()
            save_file({"scalars": self.range_loss.scalars.detach().cpu(), **beside}, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.range_loss is not None:
            file = Path(checkpoint) / STATE_FILE
            if not file.is_file():
                raise ValueError(
                    f"{checkpoint} holds no {STATE_FILE}: it was written without a range loss. Resume with --range_loss none, "
                    "or start a new run from its weights"
                )
            tensors = load_file(file)
            scalars = tensors["scalars"]
            if scalars.shape != self.range_loss.scalars.shape:
                raise ValueError(
                    f"{file} holds {scalars.numel()} scalars, but this model has {self.range_loss.scalars.numel()} restricted "
                    "weights: the run was started with other settings"
                )
            with torch.no_grad():
                self.range_loss.scalars.copy_(scalars)
            if self.scalar_optimizer is not None:
                self.scalar_optimizer.load_(tensors)
        super()._load_optimizer_and_scheduler(checkpoint)


class R2Trainer(R2TrainerMixin, Trainer):
    """Drop-in for `transformers.Trainer`, with plain `TrainingArguments` (default range loss) or `R2TrainingArguments`."""


class R2Seq2SeqTrainer(R2TrainerMixin, Seq2SeqTrainer):
    """Drop-in for `transformers.Seq2SeqTrainer`, with plain arguments or `R2Seq2SeqTrainingArguments`."""


def _check_prepared(model: nn.Module) -> None:
    """Raises ValueError, naming the layer, where the float weight behind a quantizer holds NaN: Trainer's log hides it."""
    for name, module in model.named_modules():
        if "weight_encoder" in module._modules:
            weight = module._parameters["weight"]
            if weight is not None and not torch.isfinite(weight).all():
                raise ValueError(f"the weight of layer {name!r} holds NaN or infinity; lower the learning rate")


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint folder that was written to its end (Trainer writes trainer_state.json last).

    Raises ValueError where there is none.
    """
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name[len("checkpoint-") :].isdigit()]
    for folder in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
            return str(folder)
        except (OSError, ValueError):
            logger.warning("%s was not written to its end; it is passed over", folder)
    raise ValueError(f"no complete checkpoint in {output_dir}; train without resume_from_checkpoint")
