"""What the bench scripts share: candidates that take turns, and the median of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each candidate over `rounds`, after `warm_up` more; all take turns in every round.

    So a program beside them slows all alike: quote the ratios. `before` runs before each, outside of the time.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + warm_up):
        for name, run in candidates.items():
            before()
            start = clock()
            run()
            if number >= warm_up:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}
