"""The range loss beside an optimizer, as AdamW has weight decay: steps of its own on the weights, and none in the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_r2.losses import RangeLoss


def pull_(range_loss: RangeLoss, optimizer: torch.optim.Optimizer, strength: float, first_lr: float) -> Tensor:
    """One step of plain gradient descent on the range loss alone, in place; the loss before it, scalar.

    weight -= strength x lr / first lr x dL/dweight, with the schedule of the optimizer's first group of parameters, as in
    decoupled weight decay (arXiv:1711.05101, algorithm 2, eta_t). In relative units a lone outlier moves by `strength`
    standard deviations of its weight in a step at the full rate. `first_lr` is the rate that the schedule starts from where
    the optimizer does not say (`initial_lr`). Gradients that the weights hold are left as they are.
    """
    group = optimizer.param_groups[0]
    start = group.get("initial_lr", first_lr)
    share = float(group["lr"]) / float(start) if start else 0.0
    weights = list(range_loss.weights().values())
    with torch.enable_grad():  # optimizers step without
        value = range_loss()
        pulls = torch.autograd.grad(value, weights)
    with torch.no_grad():
        for weight, pull in zip(weights, pulls, strict=True):
            weight.sub_(pull, alpha=strength * share)
    return value.detach()
