"""Schedules: how many rounds there are, who is asked, and when a round ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

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
    "Buffered",
    "ByResources",
    "BySize",
    "Constant",
    "Hinge",
    "Poisson",
    "Polynomial",
    "RoundRobin",
    "Schedule",
    "Selection",
    "Staleness",
    "Synchronous",
    "Uniform",
    "fedasync",
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


class Staleness(Protocol):
    """What an update is multiplied by when the model has moved on since its client began."""

    def discount(self, staleness: int) -> float:
        """A factor in (0, 1] for an update `staleness` versions old; 1 for a fresh one."""


@dataclass(frozen=True)
class Constant:
    """s(t) = 1: stale updates count like fresh ones (FedAsync, section 5.2)."""

    def discount(self, staleness: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Polynomial:
    """s(t) = (1 + t)^-a (FedAsync, section 5.2); FedBuff uses a = 1/2."""

    a: float = 0.5

    def __post_init__(self) -> None:
        if not self.a > 0:
            raise ConfigurationError(f"a must be positive, not {self.a}")

    def discount(self, staleness: int) -> float:
        return float((1.0 + staleness) ** -self.a)


@dataclass(frozen=True)
class Hinge:
    """s(t) = 1 up to t = b, then 1 / (a (t - b) + 1) (FedAsync, section 5.2)."""

    a: float = 10.0
    b: int = 4

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b >= 0):
            raise ConfigurationError(f"a must be positive and b not negative, not {self}")

    def discount(self, staleness: int) -> float:
        return 1.0 if staleness <= self.b else 1.0 / (self.a * (staleness - self.b) + 1.0)


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Asynchronous: nobody waits for stragglers; a step is made of the next `buffer` updates.

    Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022,
    algorithm 1. `concurrency` members are at work at any time; whoever delivers, or is lost, makes
    room for another, who begins from the newest model. An update that began from version v and
    comes at version w is multiplied by `staleness.discount(w - v)`.

    Args:
        rounds: steps of the server before the run is done.
        concurrency: members at work at the same time.
        buffer: updates in a step, K in the paper.
        staleness: the discount of late updates.
        limit: the largest w - v that is accepted; None takes everything.
        selection: who is invited where there is room.
        pull: move the model towards the client's own, and not only by the client's change:
            FedAsync's w <- (1 - a) w + a w_client, which needs buffer=1.
    """

    rounds: int
    concurrency: int
    buffer: int = 10
    staleness: Staleness = field(default_factory=Polynomial)
    limit: int | None = None
    selection: Selection = field(default_factory=Uniform)
    pull: bool = False

    adaptive = False
    deadline = None
    pause = 60.0

    def __post_init__(self) -> None:
        for name in ("rounds", "concurrency", "buffer"):
            _at_least(name, getattr(self, name), 1)
        if self.limit is not None:
            _at_least("limit", self.limit, 0)
        if self.pull and self.buffer != 1:
            raise ConfigurationError(
                f"pull=True is FedAsync's rule for one update at a time; use buffer=1, not "
                f"{self.buffer}"
            )
        if isinstance(self.selection, Poisson):
            raise ConfigurationError(
                "Poisson sampling draws whole cohorts, which an asynchronous schedule has not"
            )

    @property
    def most_faults(self) -> int:
        """Refused updates, with no step between them, beyond which a run gives up."""
        return 100 + 10 * self.buffer

    def needed(self, population: int) -> int:
        """Members at work at the same time."""
        if self.concurrency > population:
            raise ConfigurationError(
                f"concurrency={self.concurrency} is larger than the population of {population} "
                f"clients; use concurrency={population} or fewer"
            )
        return self.concurrency

    def fewest(self, population: int) -> int:
        """Members without whom nothing can begin."""
        return 1


Schedule = Synchronous | Buffered


def fedasync(
    *,
    rounds: int,
    concurrency: int,
    staleness: Staleness | None = None,
    limit: int | None = None,
) -> Buffered:
    """FedAsync: every update makes a step (Xie, Koyejo, Gupta, OPT 2020, algorithm 1).

    The mixing weight a is the algorithm's `server_lr` (0.6 in the paper), its proximal term is
    `FedProx`; weights should be "uniform".
    """
    return Buffered(
        rounds=rounds,
        concurrency=concurrency,
        buffer=1,
        staleness=staleness or Polynomial(0.5),
        limit=limit,
        pull=True,
    )


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(
            f"{name} must be a whole number of at least {least}, not {value!r}"
        )
