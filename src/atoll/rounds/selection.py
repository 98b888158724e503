"""Selection: which of the members that are there are invited to a round."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from atoll.core.random import Key
from atoll.errors import ConfigurationError
from atoll.rounds.roster import Members, Roster


class Selection(Protocol):
    """Draws members for a round; the draw depends on nothing but its arguments."""

    def draw(self, roster: Roster, count: int, round: int, key: Key) -> Members:
        """At most `count` distinct members in increasing order (Poisson: that many on average)."""


@dataclass(frozen=True)
class Uniform:
    """`count` members, every set of them equally likely (sampling without replacement)."""

    def draw(self, roster: Roster, count: int, round: int, key: Key) -> Members:
        return _choose(roster, count, key)


@dataclass(frozen=True)
class Poisson:
    """Every member independently with probability count / population.

    The size of the cohort varies: this is the sampling that amplification by subsampling assumes.
    """

    def draw(self, roster: Roster, count: int, round: int, key: Key) -> Members:
        rng = key.generator()
        candidates = roster.candidates()
        drawn = rng.binomial(len(candidates), min(count / len(roster), 1.0))
        return np.sort(rng.choice(candidates, int(drawn), replace=False, shuffle=False))


@dataclass(frozen=True)
class BySize:
    """`count` members without replacement, with probabilities proportional to their examples.

    With `FedAvg(weighting="uniform")` this is the first scheme of FedProx (Li et al., MLSys 2020).
    """

    def draw(self, roster: Roster, count: int, round: int, key: Key) -> Members:
        candidates = roster.candidates()
        sizes = roster.examples[candidates].astype(np.float64)
        candidates, sizes = candidates[sizes > 0], sizes[sizes > 0]
        if not len(candidates):
            return candidates
        count = min(count, len(candidates))
        chance = sizes / sizes.sum()
        return np.sort(key.generator().choice(candidates, count, replace=False, p=chance))


@dataclass(frozen=True)
class RoundRobin:
    """Members in turn, in the order of the roster, `count` per round."""

    def draw(self, roster: Roster, count: int, round: int, key: Key) -> Members:
        candidates = roster.candidates()
        count = min(count, len(candidates))
        if not count:
            return candidates
        start = ((round - 1) * count) % len(candidates)
        return np.sort(candidates[(start + np.arange(count)) % len(candidates)])


@dataclass(frozen=True)
class ByResources:
    """Only members whose devices report what is asked for; `then` chooses among them.

    Bonawitz et al., "Towards federated learning at scale", MLSys 2019: idle, charging, unmetered.
    """

    charging: bool = True
    unmetered: bool = True
    minimum_speed: float = 0.0
    then: Selection = field(default_factory=Uniform)

    def draw(self, roster: Roster, count: int, round: int, key: Key) -> Members:
        resources = roster.resources
        if resources is None:
            raise ConfigurationError(
                "selection by resources needs devices that report them; give simulate(devices=...)"
            )
        fit = np.ones(len(roster), bool)
        if self.charging:
            fit &= resources.charging
        if self.unmetered:
            fit &= resources.unmetered
        if self.minimum_speed > 0:
            fit &= resources.speed >= self.minimum_speed
        candidates = roster.candidates()
        return self.then.draw(
            replace(roster, present=candidates[fit[candidates]]), count, round, key
        )


def _choose(roster: Roster, count: int, key: Key) -> Members:
    rng = key.generator()
    if roster.present is None:
        # Without a candidate array the draw costs O(count), whatever the population.
        return np.sort(
            rng.choice(len(roster), min(count, len(roster)), replace=False, shuffle=False)
        )
    count = min(count, len(roster.present))
    return np.sort(rng.choice(roster.present, count, replace=False, shuffle=False))
