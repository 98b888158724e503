"""A stage of the pipeline: a client half, a server half, its own state and its measurements.

Stages before the reducer run on the client, left to right (`encode`), and are undone on the server
as messages arrive, right to left (`decode`). The reducer makes one aggregate of all messages. Then
`release` runs on the server: first the stages after the reducer, left to right, then those before
it, right to left. A stage is a frozen dataclass; what changes is passed in and handed back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import SECTIONS, STATISTICS, Layout, Vectors

if TYPE_CHECKING:
    from atoll.aggregation.pipeline import Pipeline


@dataclass(frozen=True)
class Schema:
    """What an update must hold: names, sizes and dtypes, and nothing else."""

    vectors: Mapping[str, int]
    statistics: Mapping[str, int]

    @staticmethod
    def of(layout: Layout, reports: tuple[str, ...]) -> Schema:
        """The updates of an algorithm that reports these vectors, for models of this layout."""
        statistics = {s: layout.sizes[s] for s in STATISTICS if s in layout.sizes}
        return Schema(
            dict.fromkeys(reports, layout.size), {str(k): v for k, v in statistics.items()}
        )

    @staticmethod
    def dtype(statistic: str) -> np.dtype[Any]:
        return SECTIONS[statistic]  # type: ignore[index]


class Stage(ABC):
    """One part of the pipeline; the defaults do nothing."""

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        from atoll.aggregation.pipeline import Pipeline

        return Pipeline(self) >> other

    def check(self, pipeline: Pipeline, reports: Sequence[str], weighted: bool) -> None:
        """Raise `ConfigurationError`, saying why, if the stage cannot work in this pipeline.

        `reports` names the vectors of the algorithm's updates; `weighted` says whether it gives
        them weights of their own.
        """

    def init(self) -> Vectors:
        """The stage's state at the server before the first round."""
        return {}

    def broadcast(self, state: Vectors) -> Vectors:
        """What clients must know of that state in order to encode."""
        return {}

    def remember(self, schema: Schema) -> Vectors:
        """What the client half remembers before its first round (error feedback, say)."""
        return {}

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        """Client half: the update as it goes on, and the new memory."""
        return update, memory

    def decode(self, update: Update, schema: Schema) -> Update:
        """Server half for one message: undo what the wire needed and the sum does not."""
        return update

    def release(self, aggregate: Aggregate, state: Vectors, key: Key) -> tuple[Aggregate, Vectors]:
        """Server half for the aggregate, and the stage's next state."""
        return aggregate, state


class Reducer(Stage):
    """The stage that makes one aggregate of all messages."""

    #: A rule that needs every row at once keeps all of them: O(model * clients) memory.
    needs_every_row: bool = False

    @abstractmethod
    def open(self, schema: Schema) -> Accumulator:
        """An empty accumulator for one round."""


class Sink(Protocol):
    """What updates go into."""

    #: Whether `add_folds` can be used.
    takes_folds: bool

    def add(self, update: Update) -> None:
        """Take an update in."""

    def add_rows(
        self,
        vectors: Vectors,
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
        passed: Sequence[bool],
    ) -> None:
        """Take in those of C updates that have `passed`, given as rows [C, ...] and columns [C]."""

    def add_folds(
        self,
        folds: Mapping[str, tuple[NDArray[np.int64], int]],
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        """Take in C updates whose vectors have been summed by `Learner.fold`."""


class Accumulator(ABC):
    """A round's aggregate in the making."""

    takes_folds: bool = False

    def add_folds(
        self,
        folds: Mapping[str, tuple[NDArray[np.int64], int]],
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        """Take in C updates whose vectors have been summed by `Learner.fold`."""
        raise NotImplementedError(f"{type(self).__name__} needs every update by itself")

    @abstractmethod
    def add(self, update: Update) -> None:
        """Take an update in."""

    def add_rows(
        self,
        vectors: Vectors,
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
        passed: Sequence[bool],
    ) -> None:
        """Take in those of C updates that have `passed`, given as rows [C, ...] and columns [C]."""
        for c, admitted in enumerate(passed):
            if admitted:
                self.add(
                    Update(
                        {name: rows[c] for name, rows in vectors.items()},
                        weights[c],
                        {name: rows[c] for name, rows in statistics.items()},
                        {name: column[c] for name, column in metrics.items()},
                    )
                )

    @abstractmethod
    def withdraw(self, update: Update) -> None:
        """Take an update out again, leaving no trace of it."""

    @abstractmethod
    def merge(self, other: Accumulator) -> None:
        """Take in all that another accumulator of the same round has taken in."""

    @abstractmethod
    def fresh(self) -> Accumulator:
        """An empty accumulator of the same round."""

    @abstractmethod
    def state(self) -> Vectors:
        """All that was taken in, as arrays that `restore` reads: a partial sum on its way."""

    @abstractmethod
    def restore(self, state: Vectors) -> None:
        """Become what `state` says; only on an empty accumulator."""

    @abstractmethod
    def close(self, population: int) -> Aggregate:
        """The aggregate of what was taken in, at least one update; the accumulator is used up."""
