"""Layers that keep their class, keys and attributes, but compute with another weight than the parameter they hold.

One mechanism serves Linear, Conv, transformers' Conv1D and Embedding, and every subclass of them: the layer's class is
replaced by a subclass made on the spot, in which `weight` is a property. `isinstance` still holds, the state dict still
has `weight` and `bias`, and code that reads `layer.weight` (tied heads, TensorFlow padding) sees the right tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ENCODER = "weight_encoder_of_group"  # attribute that leads a layer to the encoder it shares with those tied to it
FLOAT_BIAS = "bias_before_correction"
_CLASSES: dict[tuple[type, type], type] = {}


class QuantizedInput:
    """Passes the first argument of `forward` through `input_quantizer`, where the layer has one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on the quantized input."""
        quantizer = self.__dict__["_modules"].get("input_quantizer")
        return super().forward(x if quantizer is None else quantizer(x), *args, **kwargs)  # type: ignore[misc]


class EncodedWeight(QuantizedInput):
    """A prepared layer: `weight` is the float parameter seen through `weight_encoder`."""

    @property
    def weight(self) -> Tensor:
        """The encoded weight, differentiable in the float parameter."""
        return self.__dict__[ENCODER](self.__dict__["_parameters"]["weight"])


def dress(module: nn.Module, mixin: type) -> None:
    """Changes the class of `module`, in place, to `mixin` in front of its own class."""
    base = type(module)
    key = (mixin, base)
    if key not in _CLASSES:
        _CLASSES[key] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": base.__module__})
    module.__class__ = _CLASSES[key]


def undress(module: nn.Module) -> None:
    """Gives a dressed module its own class back, in place."""
    for (mixin, base), dressed in _CLASSES.items():
        if type(module) is dressed and issubclass(dressed, mixin):
            module.__class__ = base
            return


@contextmanager
def float_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the prepared layers of `model` compute as before: with float weight and bias, their input untouched."""
    prepared = [(module, type(module)) for module in model.modules() if is_prepared(module)]
    corrected: list[Any] = [(module, module.bias.data) for module, _ in prepared if FLOAT_BIAS in module.__dict__]
    for module, _ in prepared:
        undress(module)
    for module, _ in corrected:
        module.bias.data = module.__dict__[FLOAT_BIAS]  # type: ignore[union-attr,assignment]
    try:
        yield
    finally:
        for module, bias in corrected:
            module.bias.data = bias  # type: ignore[union-attr,assignment]
        for module, dressed in prepared:
            module.__class__ = dressed


def set_bias_(module: nn.Module, bias: Tensor) -> None:
    """Gives a prepared layer another bias, in place; inside `float_weights` it still has its own."""
    old: nn.Parameter = module.bias  # type: ignore[assignment]
    module.__dict__.setdefault(FLOAT_BIAS, old.data)
    old.data = bias.detach().to(old.dtype).clone()


def is_prepared(module: nn.Module) -> bool:
    """True for a layer with a weight encoder in front of its float weight."""
    return isinstance(module, EncodedWeight)
