"""Learning rates that change from round to round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from atoll.core.numbers import value_is_real
from atoll.errors import ConfigurationError


@runtime_checkable
class Rate(Protocol):
    """A learning rate as a function of the round, counted from 1."""

    def __call__(self, round: int) -> float: ...


@dataclass(frozen=True)
class Exponential:
    """initial * decay ** (round - 1)."""

    initial: float
    decay: float

    def __call__(self, round: int) -> float:
        return self.initial * self.decay ** (round - 1)


@dataclass(frozen=True)
class Cosine:
    """From `initial` towards `final`, which round `rounds` + 1 would reach, along half a cosine."""

    initial: float
    rounds: int
    final: float = 0.0

    def __call__(self, round: int) -> float:
        share = min((round - 1) / self.rounds, 1.0)
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Warmup:
    """Linear from 0 to `peak` over `rounds` rounds, constant after."""

    peak: float
    rounds: int

    def __call__(self, round: int) -> float:
        return self.peak * min(round / self.rounds, 1.0)


def rate_at(rate: float | Rate, round: int) -> float:
    """The learning rate of a round; it must be positive and finite."""
    value = rate(round) if callable(rate) else rate
    if not (value_is_real(value) and value > 0):
        raise ConfigurationError(
            f"lr must be positive and finite, but is {value!r} in round {round}"
        )
    return float(value)
