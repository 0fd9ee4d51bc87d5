"""PD-Quant (arXiv:2212.07048): blocks reconstructed, with the difference that each makes to the model's prediction."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_r2.attach import encoder_of, prepared_encoders
from hf_r2.batches import checked, evaluating
from hf_r2.calibration import quantizer_of
from hf_r2.dressed import FLOAT_BIAS, float_weights, set_bias_
from hf_r2.encoders.affine import Affine
from hf_r2.graph import Graph, find_blocks, read_graph
from hf_r2.graph.blocks import holds_only_tables
from hf_r2.graph.capture import run_block
from hf_r2.layers import WeightLayer, is_table
from hf_r2.ptq.bias import match_mean_
from hf_r2.ptq.learn_layer import RoundingSettings, correct_bias_, layer_problem, learn_rounding
from hf_r2.ptq.notes import Notes
from hf_r2.ptq.reconstruct import BlockProblem, Settings, layers_in, learn_block_
from hf_r2.ptq.walk import Step, frozen, walk
from hf_r2.ranges import mse_range

logger = logging.getLogger(__name__)
SLOPE = 2.2  # |V| at which a decided rounding begins: h is 0.02 or 0.98 there, and the sigmoid still has a slope
SETTINGS = ("pdquant", "qdrop", "brecq")


def pdquant_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    setting: str = "pdquant",
    start_iters: int = 500,
    correct_bias: bool = True,
    iters: int = 100,
    lr: float = 3e-2,
    act_lr: float = 4e-5,
    weight_round: float = 0.01,
    beta: Sequence[float] = (20.0, 2.0),
    warmup: float = 0.2,
    keep: float = 0.5,
    prediction: float = 10.0,
    prediction_every: int = 4,
    temperature: float = 4.0,
    correction: float = 0.02,
    correction_steps: int | None = None,
    correction_lr: float = 1e-3,
    samples: int = 1024,
    seed: int = 0,
    progress: bool = True,
    resume_dir: str | os.PathLike | None = None,
) -> None:
    """Learns the roundings of each block of a prepared model together, and the steps of its input quantizers.

    Minimizes, block after block, the block's output error (sum over channels, mean over the rest) + `weight_round` times
    AdaRound's regularizer + `prediction` times KL(softmax(z / `temperature`) || softmax(z_q / `temperature`)) of the model's
    logits (eq. 5 and 6), z_q with this block quantized and the later ones in float. The prediction is taken in one step of
    `prediction_every`, with so many times the weight: it costs a pass through the rest of the model (1: as in the paper). While
    it trains, elements of the block's input and of its quantized activations are quantized with probability `keep` (QDrop), and
    the float input is first moved towards the batch norms' statistics by `correction_steps` Adam steps (eq. 8; `correction` is
    lambda_c, which divides the distance to the original; default: 0.8 `iters` over the number of batches, as the paper).
    `setting`: "qdrop" leaves prediction and correction out (arXiv:2203.05740), "brecq" dropping too: roundings first meet the
    quantized path's inputs, activations in float (arXiv:2102.05426).

    One step takes one of the `batches`; one in eight is held out: where a block is worse on these after training than with the
    roundings that its layers learned one by one (`start_iters` steps each), those stay. The paper trains 20,000 steps a block
    at 3e-3; the default is what a CPU does in minutes. Deterministic for a `seed`; `resume_dir` as in `adaround_`.

    Raises ValueError for an unknown setting, a model whose graph cannot be read (`read_graph`), and batches it rejects.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}; got {setting!r}")
    data, plain = checked(batches, samples), setting != "pdquant"
    steps = round(0.8 * iters / len(data)) if correction_steps is None else correction_steps
    settings = Settings(
        iters=iters, lr=lr, act_lr=act_lr, weight_round=weight_round, beta=(beta[0], beta[1]), warmup=warmup, keep=keep,
        mix=setting != "brecq", prediction=0.0 if plain else prediction,
        prediction_every=prediction_every, temperature=temperature,
        correction=None if plain else correction, correction_steps=steps, correction_lr=correction_lr,
        correct_bias=correct_bias, seed=seed,
    )  # fmt: skip
    first = RoundingSettings(
        iters=start_iters, lr=lr, weight_round=weight_round, beta=(beta[0], beta[1]), warmup=warmup, activation=True,
        correct_bias=correct_bias, rows=1024, seed=seed,
    )  # fmt: skip
    notes = {"method": "pdquant", "setting": setting, "start": start_iters, **vars(settings)}
    _reconstruct_all_(model, data, settings, first, notes, resume_dir, progress)


def _reconstruct_all_(
    model: nn.Module, data: list[dict[str, Any]], settings: Settings, first: RoundingSettings, about: Mapping[str, Any],
    resume_dir: str | os.PathLike | None, progress: bool,
) -> None:  # fmt: skip
    for weight, encoder in prepared_encoders(model):
        encoder.set_range_(*mse_range(weight, encoder.grid, encoder.axis))
    notes, setting = Notes(resume_dir, model, data, about), about["setting"]
    with evaluating(model), frozen(model):
        with float_weights(model):
            graph = read_graph(model, data[0])
        blocks = find_blocks(graph, model)
        with tqdm(total=len(blocks), desc=setting, unit="block", disable=not progress) as bar:
            for number, step in enumerate(walk(model, blocks, data)):
                _reconstruct_(model, graph, step, settings, first, setting, notes, bar, settings.seed + number)
                bar.update()


def _reconstruct_(
    model: nn.Module, graph: Graph, step: Step, settings: Settings, first: RoundingSettings, setting: str, notes: Notes,
    bar: Any, seed: int,
) -> None:  # fmt: skip
    layers = layers_in(model, step.block)
    if setting != "brecq":
        _calibrate_(model, step, layers)
    if not layers or holds_only_tables(step.block, model):
        return
    noted = notes.read(step.block.name)
    if noted is not None:
        _restore_(layers, noted)
        return
    problem = BlockProblem(model, step.block, (step.floats, step.calls), step.relay, settings)
    before = problem.objective()
    starts = _start_layers_(model, graph, step, layers, first) if first.iters > 0 else {}
    started, found = _state(layers), problem.objective()
    for encoder in affine_encoders(layers):
        encoder.codes = None
    learn_block_(problem, layers, starts, torch.Generator().manual_seed(seed))
    for layer in layers if settings.correct_bias else ():
        match_mean_(model, step, layer)
    after = problem.objective()
    words = "%s: block %s, error %.4g with nearest rounding, %.4g layer by layer, %.4g as a block"
    logger.info(words, setting, step.block.name, before, found, after)
    if found < after and starts:  # a short training may end above where it began
        _restore_(layers, started)
        after = found
    bar.set_postfix_str(f"{step.block.names[-1].split('.', 1)[-1]}: {before:.3g} -> {after:.3g}", refresh=False)
    notes.write(step.block.name, _state(layers))


def affine_encoders(layers: Sequence[WeightLayer]) -> list[Affine]:
    """The affine encoders of layers that are no tables."""
    encoders = [encoder_of(layer) for layer in layers if not is_table(layer.module)]
    return [encoder for encoder in encoders if isinstance(encoder, Affine)]


def _start_layers_(
    model: nn.Module, graph: Graph, step: Step, layers: Sequence[WeightLayer], first: RoundingSettings
) -> dict[str, Tensor]:
    """Rounds a block's layers by AdaRound, in place; returns where its own training begins: the same V, drawn back to where
    the sigmoid still has a slope."""
    starts = {}
    for layer in layers:
        encoder = encoder_of(layer)
        if not isinstance(encoder, Affine) or encoder.codes is not None or is_table(layer.module):
            continue
        problem = layer_problem(model, graph, step, layer, first)
        with float_weights(model):
            rounding = learn_rounding(layer.weight, encoder, problem, first)
        encoder.set_codes_(rounding.codes())
        correct_bias_(layer.module, problem, encoder.encode(layer.weight).decode())
        starts[layer.name] = rounding.v.detach().clamp(-SLOPE, SLOPE)
    return starts


@torch.no_grad()
def _calibrate_(model: nn.Module, step: Step, layers: Sequence[WeightLayer]) -> None:
    """Gives the input quantizers of a block their range, from the quantized path."""
    waiting = [q for layer in layers if (q := quantizer_of(layer.module)) is not None and not q.ready]
    for quantizer in waiting:
        quantizer.observing = True
    for call in step.calls if waiting else ():
        run_block(model, step.block, call)
    for quantizer in waiting:
        quantizer.finish("mse")


def _state(layers: Sequence[WeightLayer]) -> dict[str, Tensor]:
    state = {}
    for layer in layers:
        encoder, quantizer = encoder_of(layer), quantizer_of(layer.module)
        if isinstance(encoder, Affine) and encoder.codes is not None:
            state[f"{layer.name}.codes"] = encoder.codes
        if FLOAT_BIAS in layer.module.__dict__:
            state[f"{layer.name}.bias"] = layer.module.bias.detach()  # type: ignore[union-attr,operator,assignment]
        if quantizer is not None and quantizer.scale is not None:
            state[f"{layer.name}.step"] = quantizer.scale
    return state


def _restore_(layers: Sequence[WeightLayer], noted: Mapping[str, Tensor]) -> None:
    for layer in layers:
        encoder, quantizer = encoder_of(layer), quantizer_of(layer.module)
        device = layer.weight.device
        if isinstance(encoder, Affine) and f"{layer.name}.codes" in noted:
            encoder.set_codes_(noted[f"{layer.name}.codes"].to(device))
        if f"{layer.name}.bias" in noted:
            set_bias_(layer.module, noted[f"{layer.name}.bias"].to(device))
        if quantizer is not None and f"{layer.name}.step" in noted:
            quantizer.scale = noted[f"{layer.name}.step"].to(device)
