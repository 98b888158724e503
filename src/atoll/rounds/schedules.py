"""Schedules: how many rounds there are, who is asked, and when a round ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from atoll.errors import ConfigurationError
from atoll.rounds.selection import (
    ByResources,
    BySize,
    Poisson,
    RoundRobin,
    Selection,
    Uniform,
)

__all__ = [
    "ByResources",
    "BySize",
    "Poisson",
    "RoundRobin",
    "Selection",
    "Synchronous",
    "Uniform",
]


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """Rounds in lockstep: invite, wait for enough, average, step.

    Args:
        rounds: how many rounds close before the run is done.
        cohort: updates that a round waits for; None is the whole population.
        invite: members invited, `cohort` or more ("need 100, invite 130"); what comes after
            enough have delivered is told that it is no longer needed.
        minimum: a round that ends with fewer updates is abandoned and tried again with a new
            draw, never averaged; None is half of what it waits for, rounded up (1 under Poisson
            sampling).
        deadline: seconds after which a round ends with what it has; None waits for everyone who
            is not lost.
        selection: who is invited.
        adaptive: ask slow members for only as much local work as they can do by the deadline
            (FedProx's partial work) instead of letting them be late.
        attempts: how often in a row a round may be abandoned before the run gives up.
        pause: seconds between an abandoned attempt and the next.
    """

    rounds: int
    cohort: int | None = None
    invite: int | None = None
    minimum: int | None = None
    deadline: float | None = None
    selection: Selection = field(default_factory=Uniform)
    adaptive: bool = False
    attempts: int = 10
    pause: float = 60.0

    def __post_init__(self) -> None:
        _at_least("rounds", self.rounds, 1)
        _at_least("attempts", self.attempts, 1)
        for name in ("cohort", "invite", "minimum"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.invite is not None and (self.cohort is None or self.invite < self.cohort):
            raise ConfigurationError(
                f"invite={self.invite} must be at least the cohort, which is {self.cohort}"
            )
        if self.minimum is not None and self.cohort is not None and self.minimum > self.cohort:
            raise ConfigurationError(
                f"minimum={self.minimum} is more than cohort={self.cohort}, so no round could close"
            )
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigurationError(f"deadline must be positive, not {self.deadline}")
        if self.adaptive and self.deadline is None:
            raise ConfigurationError("adaptive=True needs a deadline to adapt to")
        if self.pause < 0:
            raise ConfigurationError(f"pause must not be negative, not {self.pause}")

    def needed(self, population: int) -> int:
        """Updates that a round waits for."""
        if self.cohort is None:
            return population
        if self.cohort > population:
            raise ConfigurationError(
                f"cohort={self.cohort} is larger than the population of {population} clients; "
                f"use cohort={population} or fewer, or leave it out to ask everyone"
            )
        return self.cohort

    def invited(self, population: int) -> int:
        """Members to invite."""
        return min(self.invite or self.needed(population), population)

    def fewest(self, population: int) -> int:
        """Updates below which a round is abandoned."""
        if self.minimum is not None:
            return self.minimum
        if isinstance(self.selection, Poisson):
            return 1
        return (self.needed(population) + 1) // 2


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(
            f"{name} must be a whole number of at least {least}, not {value!r}"
        )
