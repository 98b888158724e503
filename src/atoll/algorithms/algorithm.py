"""The contract of an algorithm: what clients do, what the server does, and what they declare."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from atoll.aggregation.conversation import Ask, Heard, Talk
from atoll.aggregation.schema import Shape
from atoll.algorithms.client import Client
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Layout, Vector, Vectors
from atoll.errors import ConfigurationError
from atoll.learners.base import Ability, Learner


@dataclass(frozen=True)
class Gather:
    """Have clients work on what the round tells them, and aggregate it through the pipeline.

    `told` are further vectors for those who work; `whom` are those asked, None for all of them.
    """

    told: Vectors
    whom: tuple[tuple[str, int], ...] | None = None


#: What `Algorithm.talk` is: it yields an `Ask` and is sent what was `Heard`, or a `Gather` and is
#: sent the aggregate of those who worked.
Questions = Generator[Ask | Gather, Any, Aggregate]


@dataclass(frozen=True)
class Start:
    """What a server's first state is made from.

    `params` [P] are the initial parameters, `shared` the layout of what travels of the model, and
    `key` what else is drawn from.
    """

    params: Vector
    learner: Learner
    shared: Layout
    key: Key

    def another(self, number: int) -> Vector:
        """Other initial parameters [P], for algorithms of several models; 0 are the first ones."""
        if number == 0:
            return self.params
        model = self.learner.init(self.key.fold("another", number))
        if self.shared.size != self.learner.layout.size:
            raise ConfigurationError("several models cannot be begun where parts are private")
        return model["params"]


class Algorithm(ABC):
    """What clients do with what they receive, and what the server does with what it gets back.

    Server state, broadcasts and client states are dicts of named arrays of any shape. Buffers and
    counters of the model are looked after outside: they are averaged and never seen here. Rules
    are written with operators only, so the same line serves one client [P] and a stack [C, P].
    """

    #: What the local work asks of the learner, e.g. "gradient"; black boxes can only fit.
    needs: ClassVar[frozenset[Ability]] = frozenset()
    #: How often a client goes over its planned steps in one round, for virtual time.
    passes: float = 1.0
    #: Whether updates carry weights of their own; a private mean cannot have that.
    weighted: bool = True
    #: Whether `step` does the same to every entry of its vectors, which are all [P], and measures
    #: nothing: it may then be called for pieces of them, as large models are stepped.
    elementwise: bool = False
    #: The figures that clients report, and between which numbers they lie.
    metrics: ClassVar[Mapping[str, tuple[float, float]]] = {
        "train_loss": (-math.inf, math.inf),
        "steps": (0.0, math.inf),
        "seen": (0.0, math.inf),
    }

    def reports(self, shared: Layout) -> Mapping[str, Shape]:
        """The arrays of an update by name: a length, a shape, or a `Spec` with a dtype."""
        return {"delta": shared.size}

    @abstractmethod
    def init(self, start: Start) -> Vectors:
        """The server's state before the first round."""

    def broadcast(self, state: Vectors) -> Vectors:
        """What every client of a round receives."""
        return {"params": state["params"]}

    def model(self, state: Vectors) -> Vector | None:
        """The shared parameters [P] that are published; None where there is no one model."""
        return state.get("params")

    def remember(self, got: Vectors, shared: Layout) -> Vectors:
        """What a client remembers before its first round, from what it receives then."""
        return {}

    @abstractmethod
    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        """One client's work: from what it got and remembers to its update and new memory."""

    def own(self, client: Client, got: dict[str, Array], mine: dict[str, Array]) -> Array:
        """The shared parameters [P] that this client itself would use, and is judged by.

        It may train, e.g. to fine-tune; then an evaluation costs as much as a round.
        """
        return got["params"]

    @abstractmethod
    def step(
        self, state: Vectors, mean: Aggregate, server: Client
    ) -> Vectors | tuple[Vectors, Mapping[str, float]]:
        """The server's next state from the aggregate of a round, and measurements if it has any.

        `server` is what a client is, but its examples are the plan's public ones.
        """

    def talk(self, state: Vectors, talk: Talk) -> Questions:
        """One round, question by question; the default asks clients to work, and no more."""
        aggregate: Aggregate = yield Gather({})
        return aggregate

    def answer(
        self,
        name: str,
        client: Client,
        got: dict[str, Array],
        mine: dict[str, Array],
        told: dict[str, Array],
    ) -> Update:
        """A client's answer to a question of `talk` without work."""
        raise NotImplementedError(f"{type(self).__name__} asks {name!r} and has no answer to it")

    @property
    def personal(self) -> bool:
        """Whether clients use other models than the one that is published."""
        return type(self).own is not Algorithm.own

    @property
    def several(self) -> bool:
        """Whether it asks more than the one question."""
        return type(self).talk is not Algorithm.talk

    def check(self, learner: Learner) -> None:
        """Raise `ConfigurationError` if this algorithm cannot work with this learner."""
        for ability in sorted(self.needs - learner.abilities):
            reason = {
                "gradient": "changes the local gradient",
                "at": "asks for gradients at other parameters",
                "objective": "changes the local loss",
                "outputs": "looks at losses or outputs",
            }[ability]
            raise ConfigurationError(
                f"{self!r} {reason}, but {type(learner).__name__} cannot do that; use "
                "plain FedAvg with it, or another learner"
            )


__all__ = ["Algorithm", "Gather", "Heard", "Questions", "Start"]
