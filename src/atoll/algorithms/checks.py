"""Checks of hyper-parameters, in the same sentences everywhere."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Number
from typing import Any

from atoll.errors import ConfigurationError


def plain_numbers(settings: object) -> None:
    """Make NumPy's numbers among a frozen dataclass's settings Python's own.

    A NumPy number is wider than float32 where Python's is not, and would change every byte.
    """
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if isinstance(value, Number) and hasattr(value, "item"):
            object.__setattr__(settings, field.name, value.item())


def positive(name: str, value: float) -> None:
    """Raise `ConfigurationError` unless a hyper-parameter is a positive finite number."""
    if not (_number(value) and value > 0):
        raise ConfigurationError(f"{name} must be positive and finite, not {value!r}")


def at_least_zero(name: str, value: float) -> None:
    """Raise `ConfigurationError` unless a hyper-parameter is a finite number of at least 0."""
    if not (_number(value) and value >= 0):
        raise ConfigurationError(f"{name} must be at least 0 and finite, not {value!r}")


def below_one(name: str, value: float) -> None:
    """Raise `ConfigurationError` unless a decay lies in [0, 1)."""
    if not (_number(value) and 0 <= value < 1):
        raise ConfigurationError(f"{name} must be in [0, 1), not {value!r}")


def elementwise(rule: object, *methods: str) -> bool:
    """Whether a rule's class says that it works entry by entry, and none below it has another rule.

    What a class says holds for those derived from it unless they define one of these `methods`, or
    any at all where none are named: they must say it again.
    """
    for kind in type(rule).__mro__:
        if "elementwise" in vars(kind):
            return bool(vars(kind)["elementwise"])
        own: dict[str, Any] = dict(vars(kind))
        if any(callable(value) for name, value in own.items() if _counts(name, methods)):
            return False
    return False


def _counts(name: str, methods: tuple[str, ...]) -> bool:
    return name in methods if methods else not name.startswith("__")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
