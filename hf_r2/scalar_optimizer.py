"""The learnable scalars of a range loss, stepped beside an optimizer that cannot hold them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


class ScalarOptimizer:
    """An optimizer of the same class and settings as `main`, for one tensor, that steps whenever `main` does.

    Under FSDP2 accelerate takes each parameter in an optimizer for one of the model's, and so do its checkpoints. The
    learning rate is `lr` times what the scheduler has made of that of `main`; no weight decay.
    """

    def __init__(self, scalars: Tensor, main: torch.optim.Optimizer, lr: float):
        kind: Any = type(main)
        known = inspect.signature(kind).parameters
        settings = {k: v for k, v in main.defaults.items() if k in known} | {"lr": lr, "weight_decay": 0.0}
        self.own: torch.optim.Optimizer = kind([scalars], **settings)
        self.lr = lr
        self.hook = main.register_step_post_hook(self._step)

    def _step(self, main: torch.optim.Optimizer, *_: Any) -> None:
        group = main.param_groups[0]
        start = group.get("initial_lr", group["lr"])
        self.own.param_groups[0]["lr"] = self.lr * (group["lr"] / start if start else 1.0)
        self.own.step()

    def state(self) -> dict[str, Tensor]:
        """What it remembers of the scalars, by name, e.g. "state.exp_avg"; empty before the first step."""
        held = self.own.state_dict()["state"].get(0, {})
        return {f"state.{k}": torch.as_tensor(v).detach().cpu() for k, v in held.items() if v is not None}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state` gave; other entries are passed over."""
        held = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.own.load_state_dict({**self.own.state_dict(), "state": {0: held} if held else {}})
