"""What goes into blocks and layers, batch by batch, with the outputs of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.batches import inputs_for, run_batch
from hf_r2.graph.blocks import Block

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(BaseException):
    """Stops a forward pass where it has shown what it was run for; no error, so that nothing catches it on the way."""


def main_tensor(output: Any) -> Tensor:
    """The first tensor of what a module returned."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(main_tensor(value) for value in values if value is not None)


def with_main_tensor(output: Any, value: Tensor) -> Any:
    """What a module returned, with its first tensor replaced."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # transformers' ModelOutput
        key = next(k for k, part in output.items() if part is not None)
        return type(output)(**{**output, key: with_main_tensor(output[key], value)})
    first = next(i for i, part in enumerate(output) if part is not None)
    return type(output)([*output[:first], with_main_tensor(output[first], value), *output[first + 1 :]])


def with_main_input(call: Call, value: Tensor) -> Call:
    """A call of a block with its first floating-point tensor replaced."""
    args, kwargs = call
    for number, argument in enumerate(args):
        if _is_float(argument):
            return (*args[:number], value, *args[number + 1 :]), kwargs
    key = next(k for k, v in kwargs.items() if _is_float(v))
    return args, {**kwargs, key: value}


def main_input(call: Call) -> Tensor | None:
    """The first floating-point tensor among the arguments, None where there is none (token ids)."""
    args, kwargs = call
    return next((v for v in (*args, *kwargs.values()) if _is_float(v)), None)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def run_block(model: nn.Module, block: Block, call: Call) -> Any:
    """What a block returns for a call of its first module."""
    args, kwargs = call
    output = model.get_submodule(block.names[0])(*args, **kwargs)
    for name in block.names[1:]:
        output = model.get_submodule(name)(main_tensor(output))
    return output


@contextmanager
def _stubs(model: nn.Module, replies: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the modules named in `replies` return these values whatever they are given."""
    modules = [model.get_submodule(name) for name in replies]
    for module, reply in zip(modules, replies.values(), strict=True):
        module.__dict__["forward"] = lambda *_, reply=reply, **__: reply
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


class Relay:
    """Runs a model block by block over batches: what a block needs is made from the outputs of the blocks before it.

    Held in memory: the output of the last block that was finished, for every batch, and those of earlier blocks that
    later ones still read (an encoder's output). The first `index` blocks are not run again.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Mapping[str, Any]]):
        self.model, self.blocks, self.batches = model, blocks, batches
        self.finished = 0
        self._outputs: list[dict[int, Any]] = [{} for _ in batches]

    def call(self, number: int) -> Call:
        """The call that the next block gets in batch `number`; no gradients."""
        name = self.blocks[self.finished].names[0]
        caught: list[Call] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise _Reached

        handle = self.model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad(), _stubs(self.model, self._replies(number)):
                run_batch(self.model, self.batches[number], number)
        except _Reached:
            return caught[0]
        finally:
            handle.remove()
        raise ValueError(f"block {self.blocks[self.finished].name!r} was not run by batch {number}")

    def finish(self, outputs: Sequence[Any]) -> None:
        """Notes what the next block returned for each batch, and forgets what nothing reads any more."""
        done, self.finished = self.finished, self.finished + 1
        for held, output in zip(self._outputs, outputs, strict=True):
            held[done] = output
            for index in [i for i in held if i < done]:
                if self.blocks[index].read_until < self.finished:
                    held[index] = _empty_like(held[index])

    def rest(self, number: int, output: Any) -> Any:
        """What the whole model returns if the next block returned `output` in batch `number`; differentiable in it."""
        replies = self._replies(number)
        for name in self.blocks[self.finished].names:
            replies[name] = output
        with _stubs(self.model, replies):
            return self.model(**inputs_for(self.model, self.batches[number]))

    def _replies(self, number: int) -> dict[str, Any]:
        return {name: output for i, output in self._outputs[number].items() for name in self.blocks[i].names}


def _empty_like(output: Any) -> Any:
    """An output of the same form that holds no memory; nothing but its shape is read."""
    value = main_tensor(output)
    return with_main_tensor(output, value.new_zeros(()).expand(value.shape))


@contextmanager
def layer_inputs(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Inside, every first argument of the layer's forward is put into the list that is returned."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
