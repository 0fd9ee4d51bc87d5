"""Parameters with a learning rate of their own: steps and clips of quantizers, the scalars of the range loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

QUANTIZER_PARTS = ("weight_encoder", "input_quantizer")


def is_quantizer_parameter(name: str) -> bool:
    """True for the name of a step, clip or offset of a quantizer."""
    return any(part in QUANTIZER_PARTS for part in name.split("."))


def split_quantizers_(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float) -> None:
    """Moves the parameters of quantizers into a group of their own with this learning rate and no decay, in place."""
    own = {id(p): p for name, p in model.named_parameters() if is_quantizer_parameter(name) and p.requires_grad}
    if own:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({"params": list(own.values()), "lr": lr, "weight_decay": 0.0})


def make_room(scheduler: Any, lr: float) -> None:
    """Lets a user's scheduler, made before the group of the scalars, schedule that group like the last of its own."""
    if isinstance(scheduler, (schedulers.OneCycleLR, schedulers.CyclicLR)):
        raise ValueError(
            f"{type(scheduler).__name__} cannot take the range loss's scalars after it was made; set range_trainable=False, "
            "or pass optimizers=(optimizer, None)"
        )
    for inner in getattr(scheduler, "_schedulers", ()):
        make_room(inner, lr)
    for name, more in (("base_lrs", [lr]), ("lr_lambdas", None), ("min_lrs", None)):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and values:
            setattr(scheduler, name, values + (more or values[-1:]))
