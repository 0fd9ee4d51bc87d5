"""Arguments of the range loss beside those of `Trainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_r2.losses import RANGE_LOSSES, TARGETS, UNITS, learns

NO_LOSS = "none"


@dataclass
class R2Arguments:
    """Options of the range loss; raises ValueError at construction for values that are not allowed."""

    range_loss: str = field(
        default="soft_min_max",
        metadata={
            "help": "Range loss to add while training; none for plain training.",
            "choices": [*RANGE_LOSSES, NO_LOSS],
        },
    )
    range_weight: float = field(
        default=0.01,
        metadata={"help": "Strength: the loss is task loss + range_weight x sum of the range losses (>= 0)."},
    )
    range_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Start of soft_min_max's temperature; default 0.1, in other units than absolute sqrt(2 ln N)."
        },
    )
    range_trainable: bool | None = field(
        default=None,
        metadata={"help": "Whether alpha or margin learns; default: yes in absolute units, alpha no in others."},
    )
    range_lr: float = field(
        default=0.01,
        metadata={
            "help": "Learning rate of alpha or margin; no weight decay. The models' own rate would not move them."
        },
    )
    range_units: str = field(
        default="absolute",
        metadata={
            "help": "absolute: the paper's form; std: each weight over its own std (size-aware); relative: that, with steps "
            "in proportion to the weight's scale.",
            "choices": [*UNITS],
        },
    )
    range_target: str = field(
        default="raw",
        metadata={
            "help": "raw: the weight itself; deployed: with the batch norm behind it folded in.",
            "choices": [*TARGETS],
        },
    )
    range_dim: int = field(
        default=1,
        metadata={"help": "Take weights as vectors of this length along the output channels (soft_min_max)."},
    )
    range_decoupled: bool = field(
        default=False,
        metadata={
            "help": "The range loss takes steps of its own behind the optimizer's, as AdamW's weight decay does, with the same "
            "schedule: Adam's own are about the learning rate long, however strong the pull (soft_min_max, l_inf; raw)."
        },
    )
    range_every: int = field(
        default=1,
        metadata={"help": "Compute the range loss every n optimizer steps, its gradient multiplied by n."},
    )
    range_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Compiled loops for the range loss on a CPU; default: in runs of 2000 range losses and more."
        },
    )
    quantizer_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the steps and clips of a prepared model; default: the model's own."},
    )
    range_skip: list[str] = field(
        default_factory=list, metadata={"help": "Globs of layer names that the range loss leaves out."}
    )

    @property
    def has_range_loss(self) -> bool:
        """Whether there is anything to add to the task loss."""
        return self.range_loss != NO_LOSS and self.range_weight > 0

    def check_range_arguments(self) -> None:
        """Raises ValueError for a strength or learning rate that makes no sense, or an unknown choice."""
        if not (
            isinstance(self.range_weight, (int, float)) and math.isfinite(self.range_weight) and self.range_weight >= 0
        ):
            raise ValueError(f"range_weight must be a number >= 0, got {self.range_weight}")
        if not (math.isfinite(self.range_lr) and self.range_lr >= 0):
            raise ValueError(f"range_lr must be a number >= 0, got {self.range_lr}")
        if self.quantizer_lr is not None and not (math.isfinite(self.quantizer_lr) and self.quantizer_lr >= 0):
            raise ValueError(f"quantizer_lr must be a number >= 0, got {self.quantizer_lr}")
        if not isinstance(self.range_every, int) or isinstance(self.range_every, bool) or self.range_every < 1:
            raise ValueError(f"range_every must be an integer of at least 1, got {self.range_every!r}")
        for name in ("range_compile", "range_trainable"):
            if not (getattr(self, name) is None or isinstance(getattr(self, name), bool)):
                raise ValueError(f"{name} must be true, false or None, got {getattr(self, name)!r}")
        if self.range_loss not in (*RANGE_LOSSES, NO_LOSS):
            raise ValueError(
                f"no range loss called {self.range_loss!r}; there are: {', '.join([*RANGE_LOSSES, NO_LOSS])}"
            )
        self._check_decoupled()  # of a loss that there is

    def _check_decoupled(self) -> None:
        if not isinstance(self.range_decoupled, bool):
            raise ValueError(f"range_decoupled must be true or false, got {self.range_decoupled!r}")
        if not (self.range_decoupled and self.has_range_loss):
            return
        if self.range_loss == "margin" or learns(self.range_loss, self.range_trainable, self.range_units):
            raise ValueError(
                "range_decoupled=True needs a loss in which nothing learns but the weights: l_inf, or soft_min_max with "
                f"range_trainable=False or range_units std or relative; got {self.range_loss}, units {self.range_units}"
            )
        if self.range_target != "raw":
            raise ValueError(
                f"range_decoupled=True moves the weight itself: range_target raw, got {self.range_target}"
            )

    def __post_init__(self) -> None:
        self.check_range_arguments()


@dataclass
class R2TrainingArguments(R2Arguments, TrainingArguments):
    """`TrainingArguments` and the range loss's options."""

    def __post_init__(self) -> None:
        self.check_range_arguments()
        TrainingArguments.__post_init__(self)


@dataclass
class R2Seq2SeqTrainingArguments(R2Arguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the range loss's options."""

    def __post_init__(self) -> None:
        self.check_range_arguments()
        Seq2SeqTrainingArguments.__post_init__(self)
