"""Going through a prepared model block by block, with what each is fed in the float and in the quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_r2.dressed import float_weights
from hf_r2.graph.blocks import Block
from hf_r2.graph.capture import Call, Relay, run_block


@dataclass(frozen=True)
class Step:
    """A block, the calls it gets in every batch in the float and in the quantized model, and the float model's relay."""

    block: Block
    floats: list[Call]
    calls: list[Call]
    relay: Relay


def walk(model: nn.Module, blocks: Sequence[Block], data: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    """The blocks in order; what was done to one when the next is asked for is what the later ones see."""
    true, quantized = Relay(model, blocks, data), Relay(model, blocks, data)
    for block in blocks:
        with float_weights(model):
            floats = [true.call(number) for number in range(len(data))]
        calls = [quantized.call(number) for number in range(len(data))]
        yield Step(block, floats, calls, true)
        with torch.no_grad():
            with float_weights(model):
                true.finish([run_block(model, block, call) for call in floats])
            quantized.finish([run_block(model, block, call) for call in calls])


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model asks for a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
