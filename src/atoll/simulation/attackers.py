"""Attackers: clients that report something else than they should, as a part of a run.

Which clients they are is drawn from the run's seed, or said by name. They do their work honestly
and then tamper with what they report; client halves of the pipeline still follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atoll.aggregation.conversation import Talk
from atoll.aggregation.schema import Shape
from atoll.algorithms.algorithm import Algorithm, Questions, Start
from atoll.algorithms.client import Client, Holder
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Layout, Vector, Vectors
from atoll.errors import ConfigurationError
from atoll.learners.base import Learner
from atoll.rounds.task import in_numpy


class Attack(ABC):
    """What an attacker makes of its honest update; written with operators, as rules are."""

    @abstractmethod
    def tamper(self, vectors: Mapping[str, Array], client: Client) -> dict[str, Array]:
        """What every client would report if all of them were attackers: [...] or [C, ...]."""


@dataclass(frozen=True)
class SignFlip(Attack):
    """Report minus `scale` times the update (Li et al., "RSA", AAAI 2019, section 5)."""

    scale: float = 1.0

    def tamper(self, vectors: Mapping[str, Array], client: Client) -> dict[str, Array]:
        return {name: -self.scale * vector for name, vector in vectors.items()}


@dataclass(frozen=True)
class Boost(Attack):
    """Report `factor` times the update: model replacement (Bagdasaryan et al., AISTATS 2020)."""

    factor: float = 10.0

    def tamper(self, vectors: Mapping[str, Array], client: Client) -> dict[str, Array]:
        return {name: self.factor * vector for name, vector in vectors.items()}


@dataclass(frozen=True)
class RandomNoise(Attack):
    """Report Normal(0, std) instead of the update (Blanchard et al., NeurIPS 2017, section 5)."""

    std: float = 1.0

    def tamper(self, vectors: Mapping[str, Array], client: Client) -> dict[str, Array]:
        return {name: client.each(self._draws(name, vector)) for name, vector in vectors.items()}

    def _draws(self, name: str, vector: Array) -> Any:
        shape = tuple(vector.shape)

        def draw(holder: Holder) -> Any:
            rng = holder.assignment.key.fold("attack", name).generator()
            own = shape[-1:] if shape else ()
            return self.std * rng.standard_normal(own)

        return draw


@dataclass(frozen=True)
class Attackers:
    """Who attacks, and how.

    Args:
        attack: what they do.
        share: of the population, rounded down; drawn once for a run.
        names: instead of a share, who they are.
    """

    attack: Attack
    share: float = 0.0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise ConfigurationError(f"attack must be an Attack, not {self.attack!r}")
        if not 0 <= self.share <= 1 or (self.share > 0) == bool(self.names):
            raise ConfigurationError("give a share of attackers in (0, 1], or their names")

    def among(self, population: Sequence[str], key: Key) -> frozenset[str]:
        """The names of the attackers in a population."""
        if self.names:
            unknown = sorted(set(self.names) - set(population))
            if unknown:
                raise ConfigurationError(f"there is no client {unknown[0]!r} to attack")
            return frozenset(self.names)
        rng = key.fold("attackers").generator()
        count = int(self.share * len(population) + 1e-9)
        places = rng.choice(len(population), count, replace=False)
        return frozenset(population[place] for place in places.tolist())


@dataclass(frozen=True, eq=False)
class Attacked(Algorithm):
    """An algorithm, some of whose clients attack it."""

    inner: Algorithm
    attack: Attack
    names: frozenset[str]

    @property
    def needs(self) -> Any:  # type: ignore[override]
        return self.inner.needs

    @property
    def passes(self) -> float:  # type: ignore[override]
        return self.inner.passes

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.inner.weighted

    @property
    def metrics(self) -> Any:  # type: ignore[override]
        return self.inner.metrics

    @property
    def personal(self) -> bool:
        return self.inner.personal

    @property
    def several(self) -> bool:
        return self.inner.several

    def reports(self, shared: Layout) -> Mapping[str, Shape]:
        return self.inner.reports(shared)

    def init(self, start: Start) -> Vectors:
        return self.inner.init(start)

    def broadcast(self, state: Vectors) -> Vectors:
        return self.inner.broadcast(state)

    def model(self, state: Vectors) -> Vector | None:
        return self.inner.model(state)

    def remember(self, got: Vectors, shared: Layout) -> Vectors:
        return self.inner.remember(got, shared)

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        update, kept = self.inner.work(client, got, mine)
        if not any(holder.name in self.names for holder in client.holders):
            return update, kept
        bad = self.attack.tamper(update.vectors, client)
        if not client.stacked:
            return replace(update, vectors={**update.vectors, **bad}), kept
        whose = np.array([holder.name in self.names for holder in client.holders])
        mixed = {}
        for name, vector in update.vectors.items():
            good, wrong = (in_numpy(client.learner, rows) for rows in (vector, bad[name]))
            # Rows are chosen, not weighed: an attack may be infinite.
            chosen = np.where(whose.reshape(-1, *[1] * (good.ndim - 1)), wrong, good)
            mixed[name] = client.learner.asarray(chosen)
        return replace(update, vectors=mixed), kept

    def own(self, client: Client, got: dict[str, Array], mine: dict[str, Array]) -> Array:
        return self.inner.own(client, got, mine)

    def step(self, state: Vectors, mean: Aggregate, server: Client) -> Any:
        return self.inner.step(state, mean, server)

    def talk(self, state: Vectors, talk: Talk) -> Questions:
        return self.inner.talk(state, talk)

    def answer(
        self,
        name: str,
        client: Client,
        got: dict[str, Array],
        mine: dict[str, Array],
        told: dict[str, Array],
    ) -> Update:
        return self.inner.answer(name, client, got, mine, told)

    def check(self, learner: Learner) -> None:
        self.inner.check(learner)

    def __repr__(self) -> str:
        return repr(self.inner)
