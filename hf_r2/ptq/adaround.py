"""AdaRound (arXiv:2004.10568): each weight is rounded up or down so that the layer's output changes least."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_r2.attach import encoder_of, prepared_encoders, prepared_layers
from hf_r2.batches import checked, evaluating
from hf_r2.dressed import float_weights, set_bias_
from hf_r2.encoders.affine import Affine
from hf_r2.graph import Graph, find_blocks, read_graph
from hf_r2.layers import WeightLayer, is_table
from hf_r2.ptq.layer_error import Calls, Gram, Rows
from hf_r2.ptq.learn_layer import RoundingSettings, correct_bias_, layer_problem, learn_rounding
from hf_r2.ptq.notes import Notes
from hf_r2.ptq.rounding import Rounding
from hf_r2.ptq.walk import Step, walk
from hf_r2.ranges import mse_range

logger = logging.getLogger(__name__)

EXACT = 8  # bits at which biases are left alone by default


def adaround_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    iters: int = 500,
    lr: float = 3e-2,
    weight_round: float = 0.01,
    beta: Sequence[float] = (20.0, 2.0),
    warmup: float = 0.2,
    activation: bool = True,
    correct_bias: bool | None = None,
    rows: int = 1024,
    samples: int = 1024,
    seed: int = 0,
    progress: bool = True,
    resume_dir: str | os.PathLike | None = None,
) -> None:
    """Learns the rounding of every layer of a prepared model, layer by layer, on the grids of least weight error.

    Eq. 25: min E |f(W x) - f(W~ x^)|^2 + weight_round * sum(1 - |2 h(V) - 1|^beta), x from the float model, x^ from the
    part that is quantized already, f the ReLU or ReLU6 that follows (`activation`; without one the error is a quadratic
    form and needs no forward pass). `iters` Adam steps at `lr` on `rows` positions each; the regularizer sets in after the
    share `warmup`, its exponent falls linearly over `beta`. The paper takes 10,000 steps at 1e-3. Of the decided rounding and
    the nearest one the layer keeps that with the smaller error. `correct_bias`: the bias makes up for the mean of the error,
    so that the rounding is learned for what is left of it (not in the paper); by default below 8 bits, where that mean is
    more than what a few hundred samples of another kind of data would show by themselves. Tables are rounded to nearest.

    Deterministic for a `seed`. `resume_dir`: a folder where finished layers are noted; an interrupted run goes on there.
    Notes of another model, another recipe or other data are not read.

    Raises ValueError for a model whose graph cannot be read (see `read_graph`) and for batches that it rejects.
    """
    data = checked(batches, samples)
    settings = RoundingSettings(
        iters=iters, lr=lr, weight_round=weight_round, beta=(beta[0], beta[1]), warmup=warmup, activation=activation,
        correct_bias=bool(correct_bias), rows=rows, seed=seed,
    )  # fmt: skip
    for weight, encoder in prepared_encoders(model):
        encoder.set_range_(*mse_range(weight, encoder.grid, encoder.axis))
    layers = {layer.name: layer for layer in prepared_layers(model)}
    about = {**vars(settings), "method": "adaround", "correct_bias": correct_bias}
    notes = Notes(resume_dir, model, data, about)
    with evaluating(model):
        with float_weights(model):
            graph = read_graph(model, data[0])
        blocks = find_blocks(graph, model)
        done: set[int] = set()
        todo = [n for block in blocks for n in block.layers if n in layers and not is_table(layers[n].module)]
        with tqdm(total=len(todo), desc="adaround", unit="layer", disable=not progress) as bar:
            for step in walk(model, blocks, data):
                for name in [n for n in step.block.layers if n in todo]:
                    encoder = encoder_of(layers[name])
                    if isinstance(encoder, Affine) and id(encoder) not in done:
                        done.add(id(encoder))
                        corrected = encoder.grid.bits < EXACT if correct_bias is None else correct_bias
                        own = replace(settings, correct_bias=corrected)
                        _round_layer_(model, graph, step, layers[name], notes, bar, own)
                    bar.update()


def _round_layer_(
    model: nn.Module, graph: Graph, step: Step, layer: WeightLayer, notes: Notes, bar: Any, settings: RoundingSettings
) -> None:
    encoder: Affine = encoder_of(layer)  # type: ignore[assignment]
    noted = notes.read(layer.name)
    if noted is not None:
        encoder.set_codes_(noted["codes"].to(layer.weight.device))
        if "bias" in noted:
            set_bias_(layer.module, noted["bias"].to(layer.weight.device))
        return
    problem = layer_problem(model, graph, step, layer, settings)
    with float_weights(model):
        rounding = learn_rounding(layer.weight, encoder, problem, settings)
        before, after = _settle_(layer.weight, encoder, rounding, problem)
    correct_bias_(layer.module, problem, encoder.encode(layer.weight).decode())
    bar.set_postfix_str(f"{layer.name.split('.', 1)[-1]}: {before:.3g} -> {after:.3g}", refresh=False)
    logger.info("adaround: layer %s, output error %.4g with nearest rounding, %.4g after", layer.name, before, after)
    noted = {"codes": encoder.codes, "bias": layer.module._parameters.get("bias")}
    notes.write(layer.name, {key: value.detach() for key, value in noted.items() if value is not None})


@torch.no_grad()
def _settle_(weight: Tensor, encoder: Affine, rounding: Rounding, problem: Rows | Gram | Calls) -> tuple[float, float]:
    """Pins the learned codes, or the nearest where these are better; returns the error of the nearest and of the pinned."""
    nearest = encoder.encode(weight)
    encoder.set_codes_(rounding.codes())
    before, after = problem.error(nearest.decode()), problem.error(encoder.encode(weight).decode())
    if after > before:
        encoder.set_codes_(nearest.codes)
    return before, min(before, after)
