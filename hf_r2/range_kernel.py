"""Range losses of many weights at once: one autograd node, two sweeps, sums forward and gradients backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from hf_r2.range_compiled import add_compiled_, compiled_totals
from hf_r2.range_forms import (
    CHUNK,
    EXCESS,
    MAGNITUDE,
    MANY,
    SOFT_RANGE,
    Form,
    Numbers,
    Places,
    Scratch,
    bounds_of,
    flat,
    pieces,
    readable,
    single,
    working_dtype,
)
from hf_r2.range_gradient import deliver_
from hf_r2.range_shards import Shards, like_shard, shard_of

FEW = 1 << 10  # places in a weight that are kept from the forward pass to the backward pass
SMALL = 1 << 15  # weights of equal size up to this one are stacked and handled together


class Way(NamedTuple):
    """How the gradient is made.

    `compiled`: by compiled loops, for the weights on a CPU that they can take. `into_grad`: pass by pass, `backward()` adds
    it to the `.grad` of the weights when the rest of the backward pass is over, without memory of its own. To be asked for
    only where nobody waits for the gradients of the weights within the pass, as DDP does; weights with hooks, and calls of
    `torch.autograd.grad`, are recognized and get their gradient from autograd.
    """

    compiled: bool = False
    into_grad: bool = False


PLAIN = Way()


def magnitudes(weights: Sequence[Tensor], way: Way = PLAIN) -> Tensor:
    """max |w| of each weight, [len(weights)] (ALGORITHMS 1.2); 0 for an empty one.

    The gradient is the sign of the largest weight; equal ones share it, and a weight of zeros gets none.
    """
    none = torch.zeros(len(weights), device=weights[0].device)
    return _Losses.apply(MAGNITUDE, way, none, *weights)  # type: ignore[return-value]


def excesses(weights: Sequence[Tensor], sizes: Tensor, way: Way = PLAIN) -> Tensor:
    """size + sum of (|w| - size)+ of each weight, [len(weights)] (ALGORITHMS 1.3); `sizes` >= 0, [len(weights)].

    dL/dw = sign(w) where |w| > size, dL/dsize = 1 - the number of those.
    """
    return _Losses.apply(EXCESS, way, sizes, *weights)  # type: ignore[return-value]


def soft_ranges(weights: Sequence[Tensor], alphas: Tensor, way: Way = PLAIN) -> Tensor:
    """s_max - s_min of each weight (ALGORITHMS 1.4, eq. 1 of S1 without its last term), [len(weights)].

    `weights` are tensors of any shape, `alphas` [len(weights)] the temperatures (> 0). Differentiable in both, once.
    Half precision is computed in float32; the result has the widest dtype among the weights. Empty weights give 0. Of a
    DTensor the loss is that of the whole weight, the same in all processes, and the gradient a DTensor as the weight is.
    """
    return _Losses.apply(SOFT_RANGE, way, alphas, *weights)  # type: ignore[return-value]


def center_and_spread(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of all, not of a sample) of `w`: two scalars; faster than `torch.std`."""
    shards = Shards([w])
    line = flat(shard_of(w.detach()))
    dtype = working_dtype(line)
    mean = shards.total(line.sum(dtype=dtype).view(1, 1))[0, 0] / max(w.numel(), 1)
    total = torch.zeros((), dtype=dtype, device=line.device)
    for _, part in pieces(line):
        off = part - mean
        total += off.dot(off)
    return mean, (shards.total(total.view(1, 1))[0, 0] / max(w.numel(), 1)).sqrt()


def extremes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of `w`, which is not empty: two scalars, float32 for half precision."""
    local = shard_of(w.detach())
    like = torch.zeros((), dtype=working_dtype(local), device=local.device)
    high, low = Shards([w]).largest(_bounds([local], [0], like))[0]
    return -low, high


class Plan(NamedTuple):
    """What the gradient needs: the scalars and bounds of the weights, and the coefficients of their terms, row by row."""

    form: Form
    compiled: bool
    scalars: Tensor  # [N, 1]
    bounds: Tensor  # [N, 2], 0 where they are not used
    shifted: frozenset[int]  # where they are
    shares: Tensor  # [N, C]
    places: dict[int, Places]  # where the gradient lies, of weights where the totals found so, and it is little


class _Losses(torch.autograd.Function):
    """The losses of all weights: sums over them in the forward pass, the gradient from those sums in the backward pass."""

    @staticmethod
    def forward(ctx: Any, form: Form, way: Way, scalars: Tensor, *weights: Tensor) -> Tensor:
        local = [shard_of(w) for w in weights]
        wide = torch.float64 if scalars.device.type == "cpu" else working_dtype(local[0])
        column = scalars.detach().view(-1, 1).to(wide, copy=True)
        places: dict[int, Places] = {}
        bounds, shifted, totals = _measured(form, column, local, Shards(weights), way.compiled, places)
        losses, slopes, shares = form.shares(totals, column[:, 0], bounds)
        if any(ctx.needs_input_grad):
            ctx.plan = Plan(form, way.compiled, column, bounds, shifted, shares, places)
            ctx.slopes, ctx.into_grad = slopes, way.into_grad
            ctx.save_for_backward(*weights)
        return losses.to(torch.float64 if any(w.dtype == torch.float64 for w in local) else torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        later = ctx.into_grad and not torch.is_grad_enabled()  # it is where a graph of the gradient is asked for
        return _Losses._gradients(ctx, upstream, later)

    @staticmethod
    @once_differentiable
    def _gradients(ctx: Any, upstream: Tensor, later: bool) -> tuple[Tensor | None, ...]:
        weights, plan = ctx.saved_tensors, ctx.plan
        plan = plan._replace(shares=plan.shares * upstream.view(-1, 1))
        wanted = [i for i in range(len(weights)) if ctx.needs_input_grad[i + 3]]
        nodes = [node for node, _ in ctx.next_functions[1:]]
        put_off = [i for i in wanted if later and _nobody_waits(weights[i], nodes[i])]
        if put_off:
            engine: Any = Variable._execution_engine
            engine.queue_callback(partial(_add_to_grad_, plan, weights, put_off))
        found: list[Tensor | None] = [None] * len(weights)
        _add_gradients_(plan, [shard_of(w) for w in weights], found, [*{*wanted} - {*put_off}])
        made = [None if g is None else like_shard(g.to(w.dtype), w) for g, w in zip(found, weights, strict=True)]
        slope = (upstream * ctx.slopes).to(upstream.dtype) if ctx.needs_input_grad[2] else None
        return None, None, slope, *made


def _nobody_waits(w: Tensor, node: Any) -> bool:
    """Whether this pass accumulates the gradient of `w` in `.grad`, and nobody looks at what it accumulates."""
    hooked = w._backward_hooks or getattr(w, "_post_accumulate_grad_hooks", None)
    if hooked or not w.is_leaf or type(w) not in (Tensor, torch.nn.Parameter):
        return False
    if getattr(node, "variable", None) is not w:  # hooks on what is saved for the backward pass made a copy of it
        return False
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[attr-defined]
    except RuntimeError:  # so it answers within torch.autograd.grad
        return False


@torch.no_grad()
def _add_to_grad_(plan: Plan, weights: Sequence[Tensor], chosen: list[int]) -> None:
    """Adds the gradients of the chosen weights to their `.grad`."""
    held = {i: weights[i].grad for i in chosen}
    found: list[Tensor | None] = [None] * len(weights)
    for i, grad in held.items():
        found[i] = None if grad is None or grad.is_sparse else grad
    _add_gradients_(plan, weights, found, chosen)
    for i, before in held.items():
        if found[i] is not before and found[i] is not None:
            grad = found[i].to(weights[i].dtype)  # type: ignore[union-attr]
            weights[i].grad = grad if before is None else grad + before  # a sparse one


def _measured(
    form: Form,
    scalars: Tensor,
    weights: Sequence[Tensor],
    shards: Shards,
    compiled: bool,
    places: dict[int, Places],
) -> tuple[Tensor, frozenset[int], Tensor]:
    """Bounds [N, 2], of which weights they are used, and totals [N, K], all of the whole weights; fills `places`."""
    every = range(len(weights))
    if form.bounded or not readable(scalars.device):
        bounds = shards.largest(_bounds(weights, every, scalars))
        totals = _totals(form, scalars, weights, every, bounds, compiled, places)
        return bounds, frozenset(every), shards.total(totals)
    totals = shards.total(_totals(form, scalars, weights, every, None, compiled, places))
    bounds = scalars.new_zeros(len(weights), 2)
    # looked at afterwards, when the sums are at hand
    unsafe = [i for i, safe in enumerate(form.safe(totals).tolist()) if not safe]
    if unsafe:
        largest = shards.largest(_bounds(weights, unsafe, scalars))
        bounds[unsafe] = largest[unsafe]
        totals[unsafe] = shards.total(_totals(form, scalars, weights, unsafe, largest, compiled, places))[unsafe]
    return bounds, frozenset(unsafe), totals


def _bounds(weights: Sequence[Tensor], chosen: Sequence[int], like: Tensor) -> Tensor:
    """max and -min of each chosen weight, [N, 2]."""
    rows: dict[int, Any] = {}
    for indices in _batches(weights, chosen):
        x = _together([weights[i].detach() for i in indices])
        rows.update(zip(indices, _split(bounds_of(x), x), strict=True))
    return _table(rows, len(weights), like)


def _totals(
    form: Form,
    scalars: Tensor,
    weights: Sequence[Tensor],
    chosen: Sequence[int],
    bounds: Tensor | None,
    compiled: bool,
    places: dict[int, Places],
) -> Tensor:
    """The sums of each chosen weight, [N, K]; `places` where they find them."""
    rows: dict[int, Any] = {}
    scalar_rows, bound_rows = _rows(scalars), None if bounds is None else _rows(bounds)
    if compiled and bounds is None:
        rows = compiled_totals(form, [row[0] for row in scalar_rows], weights)
    scratch = Scratch()
    for indices in _batches(weights, [i for i in chosen if i not in rows]):
        x = _together([weights[i].detach() for i in indices])
        known = None if bound_rows is None else _numbers(bound_rows, indices, x)
        scratch.places = None
        totals = form.totals(x, _numbers(scalar_rows, indices, x)[0], known, scratch)
        found: Places | None = scratch.places
        if found is not None and sum(len(place) for place, _ in found) <= FEW:
            places[indices[0]] = found
        rows.update(zip(indices, _split(totals, x), strict=True))
    return _table(rows, len(weights), scalars)


def _add_gradients_(plan: Plan, weights: Sequence[Tensor], grads: list[Tensor | None], chosen: Sequence[int]) -> None:
    """Adds the gradients of the chosen weights to those in `grads`, or puts new ones there."""
    scalars, bounds, shares = _rows(plan.scalars), _rows(plan.bounds), _rows(plan.shares)
    done: Container[int] = ()
    if plan.compiled:
        free = [i for i in chosen if i not in plan.shifted]
        done = add_compiled_(plan.form, [row[0] for row in scalars], shares, weights, grads, free)
    scratch = Scratch()
    for shifted in (False, True):
        rest = [i for i in chosen if i not in done and (i in plan.shifted) is shifted]
        for indices in _batches(weights, rest):
            x = _together([weights[i].detach() for i in indices])
            known = _numbers(bounds, indices, x) if shifted else None
            scratch.places = plan.places.get(indices[0]) if single(x) else None
            terms = plan.form.gradient(
                x, _numbers(scalars, indices, x)[0], known, _numbers(shares, indices, x), scratch
            )
            deliver_(terms, plan.form.dense, x, weights, indices, grads)


def _batches(weights: Sequence[Tensor], chosen: Sequence[int]) -> Iterator[list[int]]:
    """Indices of weights to handle together: small ones of equal size, as many as stay in cache; large ones alone."""
    equal: dict[tuple, list[int]] = defaultdict(list)
    for i in chosen:
        w = weights[i]
        equal[(w.numel(), w.dtype, w.device)].append(i)
    for (numel, _, device), indices in equal.items():
        room, largest = (CHUNK, SMALL) if device.type == "cpu" else (MANY, MANY)
        step = max(1, room // max(numel, 1)) if numel <= largest else 1
        yield from (indices[k : k + step] for k in range(0, len(indices), step))


def _together(members: Sequence[Tensor]) -> Tensor:
    """[n] for one weight, [R, n] for more."""
    return flat(members[0]) if len(members) == 1 else torch.stack([flat(m) for m in members])


def _rows(table: Tensor) -> list[Any]:
    """Its rows: lists of floats where it can be read without waiting, tensors elsewhere."""
    return table.tolist() if readable(table.device) else [*table.unbind()]


def _numbers(rows: list[Any], indices: list[int], x: Tensor) -> Numbers:
    """The columns of these rows, as `x` is calculated with: floats for a single weight, [R, 1] each otherwise."""
    if single(x):
        return rows[indices[0]]
    some = [rows[i] for i in indices]
    table = torch.stack(some) if isinstance(some[0], Tensor) else torch.tensor(some, dtype=working_dtype(x))
    return [*table.to(x.device, working_dtype(x)).view(*x.shape[:-1], -1).split(1, dim=-1)]


def _split(numbers: Numbers, x: Tensor) -> list[Any]:
    """The other way round: the rows of these columns."""
    if single(x):
        return [numbers]
    shape = (*x.shape[:-1], 1)
    table = torch.cat(
        [torch.as_tensor(n, dtype=working_dtype(x), device=x.device).expand(shape) for n in numbers], dim=-1
    )
    return _rows(table.view(-1, len(numbers)))


def _table(rows: dict[int, Any], count: int, like: Tensor) -> Tensor:
    """[count, K] of these rows, 0 elsewhere."""
    first = next(iter(rows.values()))
    if any(isinstance(row, Tensor) for row in rows.values()):
        none = like.new_zeros(len(first))
        return torch.stack([torch.as_tensor(rows[i]).to(like) if i in rows else none for i in range(count)])
    return torch.tensor([rows.get(i, [0.0] * len(first)) for i in range(count)], dtype=like.dtype, device=like.device)
