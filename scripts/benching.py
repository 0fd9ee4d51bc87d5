"""What the bench scripts share: candidates that take turns, the median of their times, and what processor it was."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)  # x86, then Arm


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


def processor() -> str:
    """Name, cores and the features that decide how fast integers are, as Linux gives them; elsewhere only the name."""
    name, flags = platform.processor() or platform.machine(), set()
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    found = " ".join(feature for feature in FEATURES if feature in flags)
    return f"{name}, {os.cpu_count()} cores, {found or 'features unknown'}"
