"""Which values the options of the methods that learn roundings may have, by the option's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a finite number from `least` on, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return is_number(value, 0) and value != 0


def is_count(value: Any, least: int) -> bool:
    """Whether it is an integer from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_pair(value: Any) -> bool:
    """Whether it is two numbers above 0."""
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    return listed and all(is_positive(one) for one in value)


Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what is allowed in words
POSITIVE: Rule = (is_positive, "above 0")
NOT_NEGATIVE: Rule = (lambda v: is_number(v, 0), "0 or more")
SHARE: Rule = (lambda v: is_number(v, 0) and v <= 1, "from 0 to 1")
ONE_OR_MORE: Rule = (lambda v: is_count(v, 1), "an integer from 1 on")
ANY_COUNT: Rule = (lambda v: is_count(v, 0), "an integer from 0 on")
MAYBE_COUNT: Rule = (lambda v: v is None or is_count(v, 0), "an integer from 0 on, or None")
SWITCH: Rule = (lambda v: isinstance(v, bool), "true or false")
MAYBE: Rule = (lambda v: v is None or isinstance(v, bool), "true, false or None")
RULES: dict[str, Rule] = {
    "iters": ANY_COUNT, "start_iters": ANY_COUNT, "correction_steps": MAYBE_COUNT, "rows": ONE_OR_MORE, "samples": ONE_OR_MORE,
    "prediction_every": ONE_OR_MORE, "seed": ANY_COUNT, "lr": POSITIVE, "act_lr": NOT_NEGATIVE, "correction_lr": NOT_NEGATIVE,
    "weight_round": NOT_NEGATIVE, "prediction": NOT_NEGATIVE, "temperature": POSITIVE, "correction": POSITIVE, "keep": SHARE,
    "warmup": SHARE, "beta": (is_pair, "two numbers above 0, where it begins and where it ends"), "activation": SWITCH,
    "correct_bias": MAYBE, "progress": SWITCH,
}  # fmt: skip


def check_values(options: Mapping[str, Any], rules: Mapping[str, Rule] = RULES) -> None:
    """Raises ValueError for the first of `options` that does not fit: its name, what is allowed, and the value."""
    for name, value in options.items():
        if name in rules and not rules[name][0](value):
            raise ValueError(f"{name} must be {rules[name][1]}, got {value!r}")
