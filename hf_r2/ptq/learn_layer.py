"""The rounding of one layer, learned on what the layer reads in the float and in the quantized model (AdaRound)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.dressed import float_weights, set_bias_
from hf_r2.encoders.affine import Affine
from hf_r2.graph import Graph
from hf_r2.graph.capture import layer_inputs, run_block
from hf_r2.graph.chains import following_activation
from hf_r2.layers import WeightLayer
from hf_r2.ptq.layer_error import Calls, Gram, Rows, layer_error, row_activation
from hf_r2.ptq.rounding import Rounding, annealed_beta
from hf_r2.ptq.walk import Step


@dataclass(frozen=True, kw_only=True)
class RoundingSettings:
    """Settings of the loop; see `adaround_`."""

    iters: int
    lr: float
    weight_round: float
    beta: tuple[float, float]
    warmup: float
    activation: bool
    correct_bias: bool
    rows: int
    seed: int


def layer_problem(
    model: nn.Module, graph: Graph, step: Step, layer: WeightLayer, settings: RoundingSettings
) -> Rows | Gram | Calls:
    """The output error of a layer as a function of its weight, over all batches."""
    follows = following_activation(graph, model, layer.name) if settings.activation else None
    f = None if follows is None else row_activation(model.get_submodule(follows))
    problem = layer_error(layer.module, f, settings.correct_bias, settings.seed)
    with torch.no_grad():
        for one, other in zip(step.floats, step.calls, strict=True):
            with float_weights(model), layer_inputs(model, layer.name) as true:
                run_block(model, step.block, one)
            with layer_inputs(model, layer.name) as quantized:
                run_block(model, step.block, other)
            for x, x_hat in zip(true, quantized, strict=True):
                problem.add(x, x_hat, layer.weight, len(step.calls) * len(true))
    problem.close()
    return problem


@torch.enable_grad()
def learn_rounding(
    weight: Tensor, encoder: Affine, problem: Rows | Gram | Calls, settings: RoundingSettings
) -> Rounding:
    """The rounding after training; the encoder is not changed."""
    rounding = Rounding(weight, encoder)
    optimizer = torch.optim.Adam([rounding.v], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    for i in range(settings.iters):
        beta = annealed_beta(i / settings.iters, settings.beta, settings.warmup)
        optimizer.zero_grad()
        loss = problem.loss(rounding.soft(), settings.rows, generator)
        if beta is not None:
            loss = loss + settings.weight_round * rounding.penalty(beta)
        loss.backward()
        optimizer.step()
    return rounding


@torch.no_grad()
def correct_bias_(layer: nn.Module, problem: Rows | Gram | Calls, weight: Tensor) -> None:
    """Gives a layer the bias that makes up for the mean error of its rounded `weight`, in place, where it was asked for."""
    if not isinstance(problem, Calls) and problem.correct_bias:
        set_bias_(layer, problem.corrected_bias(weight))
