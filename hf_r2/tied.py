"""Telling transformers that tied layers share their packed tensor instead of `weight`."""

from __future__ import annotations

from transformers import PreTrainedModel

PACKED = "weight_packed"


def tied_pairs(model: PreTrainedModel) -> dict[PreTrainedModel, dict[str, str]]:
    """{submodel: {tied name: source name}}, read before any layer is packed."""
    submodels = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return {m: m.get_expanded_tied_weights_keys(all_submodels=False) for m in submodels}


def retie(model: PreTrainedModel, pairs: dict[PreTrainedModel, dict[str, str]]) -> None:
    """Points the ties of `pairs` at whichever of `weight` and `weight_packed` each layer now has, in place."""
    for submodel, ties in pairs.items():
        if ties:
            submodel._tied_weights_keys = {_stored(submodel, t): _stored(submodel, s) for t, s in ties.items()}
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _stored(model: PreTrainedModel, name: str) -> str:
    layer, _, attribute = name.rpartition(".")
    parameters = model.get_submodule(layer)._parameters
    if attribute == "weight" and PACKED in parameters:
        return f"{layer}.{PACKED}"
    if attribute == PACKED and PACKED not in parameters:
        return f"{layer}.weight"
    return name
