"""The contract of an algorithm: four functions, two for the server and two for its clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from atoll.algorithms.client import Client
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Vector, Vectors
from atoll.learners.base import Learner


class Algorithm(ABC):
    """What clients do with what they receive, and what the server does with what it gets back.

    Server state, broadcasts and memories are dicts of named vectors. Buffers and counters are
    looked after outside: they are averaged and never seen here. Rules are written with operators
    only, so the same line serves one client [P] and a stacked cohort [C, P].
    """

    #: Names of the vectors in an update, each [P].
    reports: ClassVar[tuple[str, ...]] = ("delta",)
    #: Whether the local work corrects or asks for gradients, which black-box learners lack.
    needs_gradients: ClassVar[bool] = False
    #: Whether updates carry weights of their own; a private mean cannot have that.
    weighted: bool = True

    @abstractmethod
    def init(self, params: Vector) -> Vectors:
        """The server's state before the first round; it must hold `params`."""

    def broadcast(self, state: Vectors) -> Vectors:
        """What every client of a round receives; it must hold `params`."""
        return {"params": state["params"]}

    def remember(self, params: Vector) -> Vectors:
        """What a client remembers before its first round."""
        return {}

    @abstractmethod
    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        """One client's work: from what it got and remembers to its update and new memory."""

    @abstractmethod
    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        """The server's next state from the aggregate of a round."""

    def check(self, learner: Learner) -> None:
        """Raise `ConfigurationError` if this algorithm cannot work with this learner."""
