"""Numbers that people set: whole or real, within bounds, in the same sentences everywhere."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Number, Real
from typing import Any

import numpy as np

from atoll.errors import AtollError, ConfigurationError


def plain_numbers(settings: object) -> None:
    """Make NumPy's numbers among a frozen dataclass's settings Python's own.

    A NumPy number is wider than float32 where Python's is not, and would change every byte.
    """
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if isinstance(value, Number) and hasattr(value, "item"):
            object.__setattr__(settings, field.name, value.item())


def whole(
    name: str, value: Any, least: int = 0, error: type[AtollError] = ConfigurationError
) -> int:
    """A whole number of at least `least`, NumPy's too, as Python's; else the error."""
    if _is_truth(value) or not isinstance(value, Integral) or value < least:
        raise error(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def positive(name: str, value: Any, error: type[AtollError] = ConfigurationError) -> float:
    """A positive finite number; else the error."""
    return _real(name, value, value_is_real(value) and value > 0, "positive and finite", error)


def at_least_zero(name: str, value: Any, error: type[AtollError] = ConfigurationError) -> float:
    """A finite number of at least 0; else the error."""
    good = value_is_real(value) and value >= 0
    return _real(name, value, good, "at least 0 and finite", error)


def below_one(name: str, value: Any, error: type[AtollError] = ConfigurationError) -> float:
    """A number in [0, 1); else the error."""
    return _real(name, value, value_is_real(value) and 0 <= value < 1, "in [0, 1)", error)


def value_is_real(value: object) -> bool:
    """Whether this is a finite number, and no truth value."""
    return not _is_truth(value) and isinstance(value, Real) and math.isfinite(value)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool | np.bool_)


def _real(name: str, value: Any, good: bool, wanted: str, error: type[AtollError]) -> float:
    if not good:
        raise error(f"{name} must be {wanted}, not {value!r}")
    return float(value)
