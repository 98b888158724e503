"""A stage of the pipeline: a client half, a server half, its own state and its measurements.

Stages before the reducer run on the client, left to right (`encode`), and are undone on the server
as messages arrive, right to left (`decode`, then `verify`: the server trusts no client). The
reducer makes one aggregate of all messages. Then `release` runs on the server: first the stages
after the reducer, left to right, then those before it, right to left. A stage is a frozen
dataclass; what changes is passed in and handed back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.conversation import Ask, Conversation, Talk
from atoll.aggregation.schema import Schema
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Bounds, Sender, Update
from atoll.core.vectors import Layout, Vectors


@dataclass(frozen=True)
class Sampling:
    """How a schedule draws its cohorts, as those need it who account for privacy.

    `kind` is "poisson", "fixed" (every set of `invited` equally likely) or "any" (no amplification
    by sampling may be claimed). There are `steps` steps in all, and one client is in each of them
    at most `most` times.
    """

    kind: Literal["poisson", "fixed", "any"] = "any"
    cohort: int | None = None
    invited: int | None = None
    steps: int = 1
    most: int = 1

    def rate(self, population: int) -> float:
        """The chance of one member to be in one step, at most."""
        return 1.0 if self.kind == "any" else min((self.invited or population) / population, 1.0)

    def expected(self, population: int) -> float:
        """Updates in one step, on average, if nobody is lost."""
        return float(population if self.cohort is None else self.cohort)


@dataclass(frozen=True)
class Setting:
    """Where a stage stands: what it may know of its federation when it is bound.

    `before` and `after` are the stages on its two sides. For a stage at clients `schema` is what
    reaches its `encode`; for the reducer and those after it, what the algorithm reports. `bounds`
    hold for that too. `shared` is the layout of what travels of the model.
    """

    before: tuple[Stage, ...]
    after: tuple[Stage, ...]
    schema: Schema
    bounds: Bounds
    shared: Layout
    sampling: Sampling

    @property
    def at_server(self) -> bool:
        """Whether the reducer stands before it."""
        return any(isinstance(stage, Reducer) for stage in self.before)

    @property
    def lossy(self) -> bool:
        """Whether a later stage at clients changes values on their way."""
        return any(stage.lossy for stage in self.after if not isinstance(stage, Reducer))


class Stage(ABC):
    """One part of the pipeline; the defaults do nothing."""

    #: Whether `encode` and `release` draw what nobody else may know.
    secret: ClassVar[bool] = False
    #: Whether what `decode` gives differs from what `encode` was given.
    lossy: ClassVar[bool] = False
    #: Whether exact figures of clients may not leave them beside this stage.
    hides_metrics: ClassVar[bool] = False

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        return Pipeline(self) >> other

    def bind(self, setting: Setting) -> Stage:
        """The stage as it works in this federation; raises `ConfigurationError`, saying why not."""
        return self

    def sends(self, schema: Schema) -> Schema:
        """The schema of what `encode` makes of updates of this one."""
        return schema

    def bound(self, bounds: Bounds, state: Vectors) -> Bounds:
        """How large updates can be after `encode`, if before they were within `bounds`."""
        return bounds if type(self).encode is Stage.encode else {}

    def init(self, schema: Schema) -> Vectors:
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
        """Server half for one message: back to the schema that `encode` was given.

        The message is of the schema that `sends` made. Whatever is raised refuses the update.
        """
        return update

    def verify(self, update: Update, told: Vectors) -> Update:
        """The decoded update, if an honest client can have sent it; `UpdateRefused` if not.

        Where later stages lose something, it may be brought back within what was promised.
        """
        return update

    def release(self, aggregate: Aggregate, state: Vectors, key: Key) -> tuple[Aggregate, Vectors]:
        """Server half for the aggregate, and the stage's next state."""
        return aggregate, state


class Pipeline:
    """Stages in order, as people chain them; see `pipeline` for what becomes of them."""

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        return Pipeline(*self.stages, *stages_of(other))

    def __repr__(self) -> str:
        return " >> ".join(repr(stage) for stage in self.stages)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.stages == other.stages

    def __hash__(self) -> int:
        return hash(self.stages)


def stages_of(given: Stage | Pipeline) -> tuple[Stage, ...]:
    """The stages of a chain, or a single one."""
    return given.stages if isinstance(given, Pipeline) else (given,)


class Reducer(Stage):
    """The stage that makes one aggregate of all messages."""

    @property
    def several(self) -> bool:
        """Whether a round is more than one exchange."""
        return type(self).talk is not Reducer.talk

    def fewest(self) -> int:
        """Updates without which there is no aggregate: a round with fewer is abandoned."""
        return 1

    def takes(self, schema: Schema) -> Schema:
        """What its accumulator is given, after every `decode`."""
        return schema

    @abstractmethod
    def open(self, schema: Schema) -> Accumulator:
        """An empty accumulator for one round."""

    def talk(self, schema: Schema, talk: Talk) -> Conversation:
        """One round, exchange by exchange; see `conversation`."""
        heard = yield Ask("update", self.open(schema), schema, works=True, fewest=self.fewest())
        return heard.into.close(talk.population, talk.state, talk.key)

    def seal(
        self, update: Update, told: Vectors, mail: Vectors, kept: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        """Client half of the question that is worked for: what is sent, and what it keeps."""
        return update, kept

    def answer(
        self, name: str, told: Vectors, mail: Vectors, kept: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        """A client's answer to a question without work, and what it keeps until the round ends."""
        raise NotImplementedError(f"{type(self).__name__} asks {name!r} and has no answer to it")


@dataclass(frozen=True, eq=False)
class Rows:
    """C updates at once: arrays [C, ...], and one entry of each list for each of them.

    `folds`, if given, are the vectors' weighted sums as `Stacking.fold` makes them; the vectors
    themselves then lie elsewhere.
    """

    vectors: Vectors
    statistics: Vectors
    weights: Sequence[float]
    metrics: Mapping[str, Sequence[float]]
    senders: Sequence[Sender]
    folds: Mapping[str, tuple[NDArray[np.int64], int]] | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def chosen(self, places: Sequence[int]) -> Rows:
        """Those at these places; folds cannot be chosen from."""
        if len(places) == len(self):
            return self
        at = list(places)
        return Rows(
            {name: rows[at] for name, rows in self.vectors.items()},
            {name: rows[at] for name, rows in self.statistics.items()},
            [self.weights[c] for c in at],
            {name: [column[c] for c in at] for name, column in self.metrics.items()},
            [self.senders[c] for c in at],
        )

    def update(self, c: int) -> Update:
        """One of them."""
        return Update(
            {name: rows[c] for name, rows in self.vectors.items()},
            self.weights[c],
            {name: rows[c] for name, rows in self.statistics.items()},
            {name: column[c] for name, column in self.metrics.items()},
        )


class Accumulator(ABC):
    """A round's answers in the making of an aggregate."""

    #: Whether `add_rows` can be given folds.
    takes_folds: ClassVar[bool] = False

    @abstractmethod
    def add(self, update: Update, sender: Sender) -> None:
        """Take an update in; its arrays may lie in memory that goes away, so copy what is kept."""

    def add_rows(self, rows: Rows) -> None:
        """Take in several updates."""
        for c, sender in enumerate(rows.senders):
            self.add(rows.update(c), sender)

    @abstractmethod
    def merge(self, other: Any) -> None:
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
    def close(self, population: int, state: Vectors, key: Key) -> Aggregate:
        """The aggregate of what was taken in, at least one update; the accumulator is used up.

        `state` and `key` are the reducer's, at the server.
        """
