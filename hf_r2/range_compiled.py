"""Range losses on a CPU by compiled loops, each weight read twice: once for its sums, once for its gradient."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_r2.range_forms import EXCESS, LOG2_E, SOFT_RANGE, Form, is_dense

logger = logging.getLogger(__name__)

LINES = (1024, 256)  # weights summed up in float32, the longer the quicker; the sums of lines are added in float64
GROUP = 8  # weights of equal size handled by one call, which costs as much as 30 thousand of them
SMALLEST = 1 << 12  # below, a call costs more than it saves

Columns = list[Tensor]
Loop = Callable[..., Tensor | None]


def compiler_found() -> bool:
    """Whether there is a C++ compiler that torch.compile could use on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def compiled_totals(form: Form, scalars: Sequence[float], weights: Sequence[Tensor]) -> dict[int, list[float]]:
    """{index: its totals, made without bounds} of the weights that could be handled.

    Left out are weights that are small, of odd size or kind; and all where compiling fails.
    """
    found: dict[int, list[float]] = {}
    fitting = [i for i, w in enumerate(weights) if form in LOOPS and _fits(w)]
    for chosen in _groups(weights, fitting):
        line = _line(weights[chosen[0]])
        loop = _compiled(form, "totals", len(chosen), line)
        if loop is None:
            break
        xs = [_lines(weights[i].detach(), line) for i in chosen]
        sums = loop(xs, torch.tensor([_factor(form) * scalars[i] for i in chosen]))
        assert sums is not None
        found.update(zip(chosen, sums.tolist(), strict=True))
    return found


def add_compiled_(
    form: Form,
    scalars: Sequence[float],
    shares: Sequence[Sequence[float]],
    weights: Sequence[Tensor],
    grads: list[Tensor | None],
    chosen: Sequence[int],
) -> set[int]:
    """Adds the gradients of those chosen weights that it can handle to `grads`, or puts new ones there; which they are."""
    done: set[int] = set()
    fitting = [i for i in chosen if form in LOOPS and _fits(weights[i]) and _alike(grads[i], weights[i])]
    for fresh in (False, True):
        for group in _groups(weights, [i for i in fitting if (grads[i] is None) is fresh]):
            line = _line(weights[group[0]])
            loop = _compiled(form, "fresh" if fresh else "added", len(group), line)
            if loop is None:
                return done
            xs = [_lines(weights[i].detach(), line) for i in group]
            for i in group if fresh else ():
                grads[i] = torch.empty_like(weights[i])
            lines = torch.tensor([[_factor(form) * scalars[i], *shares[i]] for i in group])
            loop(xs, [_lines(grads[i], line) for i in group], lines)  # type: ignore[arg-type]
            done.update(group)
    return done


def _fits(w: Tensor) -> bool:
    size = w.numel()
    return size >= SMALLEST and size % LINES[-1] == 0 and w.is_cpu and w.dtype == torch.float32 and is_dense(w)


def _lines(t: Tensor, line: int) -> Tensor:
    """[n / line, line] in the order of memory, a view."""
    if t.is_contiguous():
        return t.view(-1, line)
    return t.as_strided((t.numel() // line, line), (line, 1))


def _alike(grad: Tensor | None, w: Tensor) -> bool:
    """Whether elements of `w` have their gradient in the same places of memory."""
    return grad is None or (grad.dtype == w.dtype and grad.stride() == w.stride())


def _line(w: Tensor) -> int:
    return next(line for line in LINES if w.numel() % line == 0)


def _factor(form: Form) -> float:
    """What the loops take scalars multiplied by: exponentials are powers of 2."""
    return LOG2_E if form is SOFT_RANGE else 1.0


def _groups(weights: Sequence[Tensor], chosen: Sequence[int]) -> Iterator[list[int]]:
    """Indices of weights of equal size, as many as one call takes, or one by one."""
    sizes: dict[int, list[int]] = defaultdict(list)
    for i in chosen:
        sizes[weights[i].numel()].append(i)
    for indices in sizes.values():
        whole = len(indices) // GROUP * GROUP
        yield from (indices[k : k + GROUP] for k in range(0, whole, GROUP))
        yield from ([i] for i in indices[whole:])


@functools.cache
def _compiled(form: Form, what: str, count: int, line: int) -> Loop | None:
    """A compiled function for lists of `count` weights, tried once; None, after a message, where that fails."""
    loop = torch.compile(LOOPS[form][what], dynamic=True, fullgraph=True)
    # a number of lines that is no other size in sight: the compiler takes equal sizes for the same
    xs, gs = ([torch.zeros(37, line) for _ in range(count)] for _ in range(2))
    try:
        loop(xs, torch.ones(count)) if what == "totals" else loop(
            xs, gs, torch.ones(count, 5 if form is SOFT_RANGE else 2)
        )
    except Exception as error:  # whatever a compiler of whatever version may raise
        logger.warning("the range loss could not be compiled and runs uncompiled: %s", str(error).splitlines()[:1])
        return None
    return loop


def _soft_totals(xs: Columns, powers: Tensor) -> Tensor:
    """[len(xs), 6], as `SoftRange.totals` without bounds."""
    rows = []
    for x, power in zip(xs, powers.unbind(), strict=True):
        up = torch.exp2(x * power)
        down = 1 / up
        square = x * x
        factors = (up, x * up, square * up, down, -x * down, square * down)
        rows.append(torch.stack([factor.sum(-1) for factor in factors]).double().sum(-1))
    return torch.stack(rows)


def _soft_gradient(x: Tensor, line: Tensor) -> Tensor:
    """`line` [5]: power, slope and offset of the upper, then of the lower side."""
    power, slope, offset, slope_down, offset_down = line.unbind()
    up = torch.exp2(x * power)
    return up * (slope * x + offset) + (slope_down * x - offset_down) / up


def _excess_totals(xs: Columns, sizes: Tensor) -> Tensor:
    """[len(xs), 2], as `Excess.totals`."""
    rows = []
    for x, size in zip(xs, sizes.unbind(), strict=True):
        over = x.abs() - size
        outside = (over > 0).float()
        rows.append(torch.stack([over.clamp(min=0).sum(-1), outside.sum(-1)]).double().sum(-1))
    return torch.stack(rows)


def _excess_gradient(x: Tensor, line: Tensor) -> Tensor:
    """`line` [2]: size and pull."""
    size, pull = line.unbind()
    return pull * ((x > size).float() - (x < -size).float())


def _adding(gradient: Loop) -> Loop:
    def add_(xs: Columns, gs: Columns, lines: Tensor) -> None:
        for x, g, line in zip(xs, gs, lines.unbind(), strict=True):
            g.add_(gradient(x, line))  # type: ignore[arg-type]

    return add_


def _filling(gradient: Loop) -> Loop:
    def fill_(xs: Columns, gs: Columns, lines: Tensor) -> None:
        for x, g, line in zip(xs, gs, lines.unbind(), strict=True):
            g.copy_(gradient(x, line))  # type: ignore[arg-type]

    return fill_


def _loops(totals: Loop, gradient: Loop) -> dict[str, Loop]:
    return {"totals": totals, "added": _adding(gradient), "fresh": _filling(gradient)}


LOOPS = {SOFT_RANGE: _loops(_soft_totals, _soft_gradient), EXCESS: _loops(_excess_totals, _excess_gradient)}
