"""Schedules: how many rounds there are, who is asked, and when a round ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from atoll.aggregation.stage import Sampling
from atoll.core.numbers import plain_numbers, whole
from atoll.core.vectors import Layout, describe_names
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


class Schedule(ABC):
    """How many rounds there are, who is asked, and when a round ends."""

    #: Whether everyone at work is at work for the same round.
    lockstep: ClassVar[bool]
    #: Whether a single update moves the model towards the client's own (FedAsync).
    pull: bool = False
    #: Whether slow members are asked for less work.
    adaptive: bool = False
    #: Seconds after which a round ends with what it has.
    deadline: float | None = None
    #: Seconds between an abandoned attempt and the next.
    pause: float = 60.0
    #: Refused updates, with no step between them, beyond which a run gives up; None has attempts.
    most_faults: int | None = None

    rounds: int

    @abstractmethod
    def needed(self, population: int) -> int:
        """Updates that a round waits for, or members at work at the same time."""

    @abstractmethod
    def fewest(self, population: int) -> int:
        """Updates below which a round is abandoned."""

    @abstractmethod
    def sampling(self) -> Sampling:
        """How this draws, for those who account for it."""

    @property
    @abstractmethod
    def least(self) -> int:
        """Members that must be there before anything can begin."""

    @property
    @abstractmethod
    def wanted(self) -> int | None:
        """Members that the first round waits for; None is all who were invited."""

    @abstractmethod
    def enough(self, population: int, *, patient: bool) -> int:
        """Members that must be present to begin; the `patient` wait for all that are asked."""

    def discount(self, staleness: int) -> float:
        """What an update that is so many versions old is multiplied by."""
        return 1.0

    def check(self, reports: Iterable[str], shared: Layout) -> None:
        """Raise `ConfigurationError` if updates like these do not fit this schedule."""


@dataclass(frozen=True, kw_only=True)
class Synchronous(Schedule):
    """Rounds in lockstep: invite, wait for enough, average, step.

    Args:
        rounds: how many rounds close before the run is done.
        cohort: updates that a round waits for; None is the whole population.
        invite: members invited, `cohort` or more ("need 100, invite 130"); what comes after
            enough have delivered is told that it is no longer needed.
        minimum: a round that ends with fewer updates is abandoned and tried again with a new
            draw, never averaged; None is half of what it waits for, rounded up (0 under Poisson
            sampling, where an empty round is a round: else its sampling would be another).
        deadline: seconds after which a round ends with what it has; None waits for everyone who
            is not lost.
        selection: who is invited.
        adaptive: ask slow members for only as much local work as they can do by the deadline
            (FedProx's partial work) instead of letting them be late.
        attempts: how often in a row a round may be abandoned before the run gives up.
        pause: seconds between an abandoned attempt and the next.
    """

    lockstep: ClassVar[bool] = True

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
        plain_numbers(self)
        whole("rounds", self.rounds, 1)
        whole("attempts", self.attempts, 1)
        for name in ("cohort", "invite", "minimum"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
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
            return 0
        return (self.needed(population) + 1) // 2

    def sampling(self) -> Sampling:
        invited = self.invite or self.cohort
        if isinstance(self.selection, Poisson):
            return Sampling("poisson", self.cohort, invited, self.rounds)
        kind: Literal["fixed", "any"] = "fixed" if isinstance(self.selection, Uniform) else "any"
        return Sampling(kind, self.cohort, invited, self.rounds)

    @property
    def least(self) -> int:
        return max(self.cohort or 1, self.minimum or 1)

    @property
    def wanted(self) -> int | None:
        return None if self.cohort is None else self.invite or self.cohort

    def enough(self, population: int, *, patient: bool) -> int:
        return self.invited(population) if patient else max(self.fewest(population), 1)


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
class Buffered(Schedule):
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

    lockstep: ClassVar[bool] = False

    rounds: int
    concurrency: int
    buffer: int = 10
    staleness: Staleness = field(default_factory=Polynomial)
    limit: int | None = None
    selection: Selection = field(default_factory=Uniform)
    pull: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "concurrency", "buffer"):
            whole(name, getattr(self, name), 1)
        if self.limit is not None:
            whole("limit", self.limit, 0)
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
    def most_faults(self) -> int:  # type: ignore[override]
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
        return 1

    def sampling(self) -> Sampling:
        # Whoever is fast comes often, and may come twice into one buffer.
        return Sampling("any", self.buffer, None, self.rounds, self.buffer)

    @property
    def least(self) -> int:
        return self.concurrency

    @property
    def wanted(self) -> int | None:
        return self.concurrency

    def enough(self, population: int, *, patient: bool) -> int:
        return 1

    def discount(self, staleness: int) -> float:
        return self.staleness.discount(staleness)

    def check(self, reports: Iterable[str], shared: Layout) -> None:
        if self.pull and "delta" not in reports:
            raise ConfigurationError("pull=True needs an algorithm that reports a delta")
        others = sorted(set(reports) - {"delta"})
        if others and not isinstance(self.staleness, Constant):
            # A control variate that the server takes half of and its client keeps whole no longer
            # adds up; a product or a count is discounted twice, or cut off.
            raise ConfigurationError(
                f"the algorithm reports {describe_names(others)} beside its change, and what these "
                "mean does not survive the discount of stale updates; use "
                "Buffered(staleness=schedules.Constant()), with limit= against very stale ones"
            )
        statistics = [section for section in shared.sizes if section != "params"]
        if statistics:
            raise ConfigurationError(
                f"the model has {' and '.join(statistics)} (BatchNorm's statistics, say), which an "
                "asynchronous schedule would add up from different versions; use GroupNorm or "
                "LayerNorm, or a Synchronous schedule"
            )


def fedasync(
    *,
    rounds: int,
    concurrency: int,
    staleness: Staleness | None = None,
    limit: int | None = None,
) -> Buffered:
    """FedAsync: every update makes a step (Xie, Koyejo, Gupta, OPT 2020, algorithm 1).

    The mixing weight a is the server optimiser's rate, `FedAvg(server=SGD(0.6))` in the paper, its
    proximal term is `FedProx`; weights should be "uniform".
    """
    return Buffered(
        rounds=rounds,
        concurrency=concurrency,
        buffer=1,
        staleness=staleness or Polynomial(0.5),
        limit=limit,
        pull=True,
    )
