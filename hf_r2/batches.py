"""Running a model over calibration batches, with errors that name the batch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
Batches = Iterable[Mapping[str, Any]]
LABELS = ("labels", "label", "start_positions", "end_positions")


def checked(batches: Batches | None, samples: int | None = None, *, labels: bool = False) -> list[dict[str, Any]]:
    """The batches as a list, of at most `samples` samples (the first dimension of their tensors); without labels unless asked.

    Fewer samples are enough. Raises ValueError for no batch at all, for a batch that is no mapping or holds no sample, and for
    NaN or infinity (batch and key named); TypeError for `batches` that hold no batches, such as one batch alone.
    """
    if isinstance(batches, (Mapping, Tensor, str)) or not (batches is None or _can_be_iterated(batches)):
        hint = ": put a single batch into a list, [batch]" if isinstance(batches, Mapping) else ""
        raise TypeError(
            f"batches must be a list or loader of keyword dicts for forward, got {type(batches).__name__}{hint}"
        )
    kept: list[dict[str, Any]] = []
    seen = 0
    for number, batch in enumerate(() if batches is None else batches):  # a loader may have no length to be asked for
        if not isinstance(batch, Mapping):
            raise ValueError(f"batch {number}: batches must be keyword dicts for forward, got {type(batch).__name__}")
        batch = {k: v for k, v in batch.items() if labels or k not in LABELS}
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"batch {number} holds NaN or infinity in {key!r}")
        size = samples_in(batch)
        if size == 0:
            key = next(k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > 0)
            raise ValueError(f"batch {number} holds no sample: {key!r} has shape {list(batch[key].shape)}")
        if samples is not None and seen + size > samples:
            batch = {k: _first(v, samples - seen, size) for k, v in batch.items()}
        kept.append(batch)
        seen += size
        if samples is not None and seen >= samples:
            return kept
    if not kept:
        raise ValueError("calibration needs at least one batch; batches was empty")
    return kept


def warn_of_fewer(batches: Sequence[Mapping[str, Any]], samples: int) -> None:
    """Says in the log that `batches` hold fewer than the `samples` that someone asked for."""
    found = sum(map(samples_in, batches))
    if found < samples:
        logger.warning("%d calibration samples, fewer than the %d asked for", found, samples)


def _can_be_iterated(batches: Any) -> bool:
    try:
        iter(batches)
    except TypeError:
        return False
    return True


def samples_in(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the first dimension of its first tensor, 1 without any."""
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0), 1)


def _first(value: Any, count: int, size: int) -> Any:
    whole = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
    return value[:count] if whole else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def inputs_for(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors where the model's parameters are, without labels.

    Key-value caches are switched off: they grow with every call of a layer, and cannot be exported.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k not in LABELS}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def run_batch(model: nn.Module, batch: Mapping[str, Any], number: int) -> Any:
    """`model(**batch)`; raises ValueError that says which batch the model rejected, and why."""
    inputs = inputs_for(model, batch)
    try:
        return model(**inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"batch {number} (keys {', '.join(batch)}) was rejected by the model: {error}") from error


@torch.no_grad()
def check_accepted(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    """Runs one sample of every batch whose keys, types or shapes are new; raises ValueError where the model rejects it."""
    known = set()
    with evaluating(model):
        for number, batch in enumerate(batches):
            form = tuple(
                (k, v.dtype, v.shape[1:]) if isinstance(v, Tensor) else (k, type(v)) for k, v in sorted(batch.items())
            )
            if form not in known:
                known.add(form)
                size = samples_in(batch)
                run_batch(model, {k: _first(v, 1, size) for k, v in batch.items()}, number)
