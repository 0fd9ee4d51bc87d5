"""AdaRound (arXiv:2004.10568): each weight is rounded up or down so that the layer's output changes least."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_r2.attach import encoder_of, prepared_encoders, prepared_layers
from hf_r2.batches import checked, evaluating
from hf_r2.dressed import float_weights
from hf_r2.encoders.affine import Affine
from hf_r2.graph import Graph, find_blocks, read_graph
from hf_r2.graph.capture import layer_inputs, run_block
from hf_r2.graph.chains import following_activation
from hf_r2.layers import WeightLayer, is_table
from hf_r2.ptq.layer_error import Calls, Gram, Rows, layer_error, row_activation
from hf_r2.ptq.notes import Notes, fingerprint
from hf_r2.ptq.rounding import Rounding, annealed_beta
from hf_r2.ptq.walk import Step, walk
from hf_r2.ranges import mse_range

logger = logging.getLogger(__name__)


def adaround_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    iters: int = 1000,
    lr: float = 1e-2,
    weight_round: float = 0.01,
    beta: Sequence[float] = (20.0, 2.0),
    warmup: float = 0.2,
    activation: bool = True,
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
    share `warmup`, its exponent falls linearly over `beta`. The paper takes 10,000 steps at 1e-3; 1e-2 needs a tenth. Of the
    decided rounding and the nearest one the layer keeps that with the smaller error. Tables are rounded to nearest.

    Deterministic for a `seed`. `resume_dir`: a folder where finished layers are noted; an interrupted run goes on there.

    Raises ValueError for a model whose graph cannot be read (see `read_graph`) and for batches that it rejects.
    """
    data = checked(batches, samples)
    options = {"iters": iters, "lr": lr, "weight_round": weight_round, "beta": tuple(beta), "warmup": warmup}
    options |= {"activation": activation, "rows": rows, "seed": seed}
    for weight, encoder in prepared_encoders(model):
        encoder.set_range_(*mse_range(weight, encoder.grid, encoder.axis))
    layers = {layer.name: layer for layer in prepared_layers(model)}
    about = fingerprint({name: layer.weight for name, layer in layers.items()}, data)
    notes = Notes(resume_dir, {**about, **options, "method": "adaround"})
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
                        _round_layer_(model, graph, step, layers[name], notes, bar, options)
                    bar.update()


def _round_layer_(
    model: nn.Module, graph: Graph, step: Step, layer: WeightLayer, notes: Notes, bar: Any, options: Mapping[str, Any]
) -> None:
    encoder: Affine = encoder_of(layer)  # type: ignore[assignment]
    noted = notes.read(layer.name)
    if noted is not None:
        encoder.set_codes_(noted["codes"].to(layer.weight.device))
        return
    problem = _problem(model, graph, step, layer, options)
    before, after = _learn_(layer.weight, encoder, problem, options)
    bar.set_postfix_str(f"{layer.name.split('.', 1)[-1]}: {before:.3g} -> {after:.3g}", refresh=False)
    logger.info("adaround: layer %s, output error %.4g with nearest rounding, %.4g after", layer.name, before, after)
    notes.write(layer.name, {"codes": encoder.codes})  # type: ignore[dict-item]


def _problem(
    model: nn.Module, graph: Graph, step: Step, layer: WeightLayer, options: Mapping[str, Any]
) -> Rows | Gram | Calls:
    """The output error of a layer, fed with what it reads in the float and in the quantized model."""
    follows = following_activation(graph, model, layer.name) if options["activation"] else None
    f = None if follows is None else row_activation(model.get_submodule(follows))
    problem = layer_error(layer.module, f, options["seed"])
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


def _learn_(weight: Tensor, encoder: Affine, problem: Any, options: Mapping[str, Any]) -> tuple[float, float]:
    """Trains the rounding and pins it; returns the error of nearest rounding and the one reached."""
    nearest = encoder.encode(weight)
    before = problem.error(nearest.decode())
    rounding = Rounding(weight, encoder)
    optimizer = torch.optim.Adam([rounding.v], lr=options["lr"])
    generator = torch.Generator().manual_seed(options["seed"])
    for step in range(options["iters"]):
        beta = annealed_beta(step / options["iters"], options["beta"], options["warmup"])
        optimizer.zero_grad()
        loss = problem.loss(rounding.soft(), options["rows"], generator)
        if beta is not None:
            loss = loss + options["weight_round"] * rounding.penalty(beta)
        loss.backward()
        optimizer.step()
    encoder.set_codes_(rounding.codes())
    after = problem.error(encoder.encode(weight).decode())
    if after > before:
        encoder.set_codes_(nearest.codes)
        after = before
    return before, after
