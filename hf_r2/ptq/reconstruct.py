"""Block reconstruction: roundings and input steps of a block trained so that its output, and the model's, change least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_r2.attach import encoder_of, prepared_layers, replace_encoder_
from hf_r2.dressed import float_weights
from hf_r2.encoders.activations import InputQuantizer
from hf_r2.encoders.affine import Affine
from hf_r2.graph.blocks import Block
from hf_r2.graph.capture import (
    Call,
    Relay,
    main_input,
    main_tensor,
    run_block,
    with_main_input,
    with_main_tensor,
)
from hf_r2.layers import CONVOLUTIONS, TRANSPOSED, WeightLayer, is_table
from hf_r2.ptq.distribution import correct
from hf_r2.ptq.learned_step import LearnedStep, drawn
from hf_r2.ptq.rounding import Rounding, annealed_beta

SHARE = 8  # one batch in so many is held out: what is trained in a block is judged on batches that it has not seen


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the loop; see `pdquant_`."""

    iters: int
    lr: float
    act_lr: float
    weight_round: float
    beta: tuple[float, float]
    warmup: float
    keep: float
    mix: bool
    prediction: float
    prediction_every: int
    temperature: float
    correction: float | None
    correction_steps: int
    correction_lr: float
    correct_bias: bool
    seed: int


def prediction_difference(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)), mean over the batch, without the factor T^2 (eq. 5)."""
    log_q = F.log_softmax(logits.flatten(0, -2) / temperature, dim=-1)
    log_p = F.log_softmax(target.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def reconstruction_error(output: Tensor, target: Tensor, axis: int) -> Tensor:
    """Squared error, sum over the channels (`axis`), mean over everything else."""
    return (output.float() - target.float()).square().sum(axis).mean()


class BlockProblem:
    """One block with what it is fed in both models, in every batch, and what should come out of it."""

    def __init__(
        self, model: nn.Module, block: Block, calls: tuple[list[Call], list[Call]], relay: Relay, settings: Settings
    ):
        self.model, self.block, self.relay, self.settings = model, block, relay, settings
        self.floats, self.calls = list(calls[0]), calls[1]
        last = model.get_submodule(block.layers[-1])
        self.axis = 1 if isinstance(last, (*CONVOLUTIONS, *TRANSPOSED)) else -1
        with torch.no_grad(), float_weights(model):
            self.outputs = [run_block(model, block, call) for call in self.floats]
        self.targets = [main_tensor(output) for output in self.outputs]
        self.logits: list[Tensor | None] = [None] * len(self.floats)
        if settings.correction is not None:
            self._correct_()

    def _correct_(self) -> None:
        """Corrected inputs and the float block's outputs for them take the place of the true ones."""
        s = self.settings
        assert s.correction is not None
        for number, call in enumerate(self.floats):
            x = main_input(call)
            if x is None or x.dim() < 3:
                return
            with float_weights(self.model):
                x = correct(
                    self.model, list(self.block.layers), lambda v, c=call: self._run(c, v), x, s.correction,
                    s.correction_steps, s.correction_lr,
                )  # fmt: skip
                self.floats[number] = with_main_input(call, x)
                with torch.no_grad():
                    self.targets[number] = main_tensor(run_block(self.model, self.block, self.floats[number]))

    def _run(self, call: Call, x: Tensor) -> Any:
        return run_block(self.model, self.block, with_main_input(call, x))

    def mixed(self, number: int, generator: torch.Generator) -> Call:
        """The block's input with each element from the quantized or from the float model (QDrop)."""
        call = self.calls[number]
        x, true = main_input(call), main_input(self.floats[number])
        if not self.settings.mix or x is None or true is None:
            return call
        return with_main_input(call, torch.where(drawn(x, self.settings.keep, generator), x, true))

    def prediction(self, number: int) -> Tensor:
        """The difference that the block as it is makes to the model's prediction in a batch."""
        if self.logits[number] is None:
            with torch.no_grad(), float_weights(self.model):
                self.logits[number] = main_logits(self.relay.rest(number, self.outputs[number]))
        output = main_tensor(run_block(self.model, self.block, self.calls[number]))
        with float_weights(self.model):
            result = self.relay.rest(number, with_main_tensor(self.outputs[number], output))
        return prediction_difference(main_logits(result), self.logits[number], self.settings.temperature)  # type: ignore[arg-type]

    @property
    def held_out(self) -> list[int]:
        """Numbers of the batches that are judged on: the last eighth, or all where there are less than eight."""
        count = len(self.calls)
        return list(range(self.trained_on, count)) or list(range(count))

    @property
    def trained_on(self) -> int:
        """How many batches are trained on: the first so many."""
        count = len(self.calls)
        return count - count // SHARE

    @torch.no_grad()
    def objective(self) -> float:
        """Reconstruction error and weighted prediction difference over the batches held out, everything quantized."""
        error = 0.0
        for number in self.held_out:
            output = main_tensor(run_block(self.model, self.block, self.calls[number]))
            error += float(reconstruction_error(output, self.targets[number], self.axis))
            if self.settings.prediction > 0:
                error += self.settings.prediction * float(self.prediction(number))
        return error / len(self.held_out)


def main_logits(output: Any) -> Tensor:
    """The logits of a model's output, or its first tensor."""
    logits = getattr(output, "logits", None)
    return main_tensor(output) if logits is None else logits


@torch.enable_grad()
def learn_block_(
    problem: BlockProblem, layers: Sequence[WeightLayer], starts: Mapping[str, Tensor], generator: torch.Generator
) -> None:
    """Trains the roundings of `layers` and the steps of their input quantizers, in place, and pins both.

    `starts`: where the roundings of some layers begin, by layer name; the others begin at the float weight.
    """
    model, s = problem.model, problem.settings
    roundings = _install_(model, layers, starts)
    steps = _learn_steps_(layers, generator)
    optimizer = torch.optim.Adam([r.v for r in roundings.values()], lr=s.lr)
    act_optimizer = torch.optim.Adam([step.scale for step in steps.values()], lr=s.act_lr) if steps else None
    order = torch.randint(problem.trained_on, (s.iters,), generator=generator).tolist()
    for i, number in enumerate(order):
        for step in steps.values():
            step.keep = s.keep
        output = main_tensor(run_block(model, problem.block, problem.mixed(number, generator)))
        loss = reconstruction_error(output, problem.targets[number], problem.axis)
        if s.prediction > 0 and i % s.prediction_every == 0:
            for step in steps.values():
                step.keep = 1.0
            loss = loss + s.prediction * s.prediction_every * problem.prediction(number)
        beta = annealed_beta(i / s.iters, s.beta, s.warmup)
        if beta is not None:
            loss = loss + s.weight_round * sum(r.penalty(beta) for r in roundings.values())
        optimizer.zero_grad()
        if act_optimizer is not None:
            act_optimizer.zero_grad()
            for group in act_optimizer.param_groups:
                group["lr"] = s.act_lr * (1 + math.cos(math.pi * i / s.iters)) / 2
        loss.backward()
        optimizer.step()
        if act_optimizer is not None:
            act_optimizer.step()
    for layer, rounding in roundings.items():
        replace_encoder_(model, layer, rounding.encoder)
        rounding.encoder.set_codes_(rounding.codes())
    for layer, step in steps.items():
        layer.module._modules["input_quantizer"] = step.settle_()


def _install_(
    model: nn.Module, layers: Sequence[WeightLayer], starts: Mapping[str, Tensor]
) -> dict[WeightLayer, Rounding]:
    roundings = {}
    for layer in layers:
        encoder = encoder_of(layer)
        if isinstance(encoder, Affine) and encoder.codes is None and not is_table(layer.module):
            roundings[layer] = Rounding(layer.weight, encoder, starts.get(layer.name))
            replace_encoder_(model, layer, roundings[layer])
    return roundings


def _learn_steps_(layers: Sequence[WeightLayer], generator: torch.Generator) -> dict[WeightLayer, LearnedStep]:
    steps = {}
    for layer in layers:
        quantizer = layer.module._modules.get("input_quantizer")
        if isinstance(quantizer, InputQuantizer) and not quantizer.dynamic and quantizer.ready:
            steps[layer] = layer.module._modules["input_quantizer"] = LearnedStep(quantizer, generator)
    return steps


def layers_in(model: nn.Module, block: Block) -> list[WeightLayer]:
    """The prepared layers of a block, in the order of the computation."""
    prepared: Mapping[str, WeightLayer] = {layer.name: layer for layer in prepared_layers(model)}
    return [prepared[name] for name in block.layers if name in prepared]
