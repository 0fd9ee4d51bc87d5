"""Packed tensors read from a checkpoint straight into their layers, without a turn each in transformers' loop.

That loop spends more on a tensor's name (it compiles a pattern for each) than a packed layer's few bytes take to read, and a
packed model has more tensors than its float original.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_r2.names import relative_name
from hf_r2.packed_layers import STATE, packed_layers

READ = r"\.weight_(packed|scale|zero_point|centroids|rest)$"


IGNORED, WITHHELD = "_keys_to_ignore_on_load_unexpected", "_withheld"


def is_direct(key: str) -> bool:
    """Whether a key of a checkpoint names a tensor that can be read straight into its layer."""
    return key.rpartition(".")[2] in STATE


def fill_(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> bool:
    """Puts `stored` tensors (of the keys that `is_direct` allows) into the packed layers that await them, in place.

    All or none: False, and nothing is changed, where a key, a shape or a dtype is not what the model awaits (a model whose
    layers transformers renames, a checkpoint with a head that the model lacks). What is tied to a stored tensor is left to
    transformers. Until `release_` the model's state dict lacks what was filled in, so that transformers neither awaits these
    keys nor warns of them.
    """
    awaited: dict[str, tuple[nn.Module, str]] = {}
    for name, module in packed_layers(model).items():
        awaited |= {f"{name}.{key}": (module, key) for key in STATE if getattr(module, key, None) is not None}
    found = {relative_name(model, key): tensor for key, tensor in stored.items()}
    filled = {name: found.pop(key) for name in awaited if (key := relative_name(model, name)) in found}
    left = awaited.keys() - filled.keys() - model.all_tied_weights_keys.keys()
    if found or left or not all(_fits(awaited[name], tensor) for name, tensor in filled.items()):
        return False
    for name, tensor in filled.items():
        _put_(*awaited[name], tensor)
    before = {key: model.__dict__[key] for key in (IGNORED,) if key in model.__dict__}
    setattr(model, IGNORED, {*(getattr(model, IGNORED) or ()), READ})
    model.__dict__[WITHHELD] = (model.register_state_dict_post_hook(_Withheld(filled.keys())), before)
    return True


def release_(model: PreTrainedModel) -> None:
    """Ends what `fill_` began: the state dict is whole again."""
    handle, before = model.__dict__.pop(WITHHELD, (None, {}))
    if handle is not None:
        handle.remove()
        del model.__dict__[IGNORED]
        model.__dict__.update(before)


def _fits(place: tuple[nn.Module, str], tensor: Tensor) -> bool:
    awaited: Tensor = getattr(*place)
    return awaited.shape == tensor.shape and awaited.dtype == tensor.dtype


def _put_(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in module._parameters:
        tensor = module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers fills what is not marked


class _Withheld:
    """Takes the tensors that were filled in out of a state dict."""

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)

    def __call__(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
        for name in self.names:
            del state_dict[prefix + name]
