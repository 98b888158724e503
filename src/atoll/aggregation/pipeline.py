"""The pipeline: stages chained by `>>`, from a client's update to the server's step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from atoll.aggregation.stage import Accumulator, Reducer, Schema, Stage
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Vectors, part, prefixed
from atoll.errors import ConfigurationError


class Pipeline:
    """Stages in order, exactly one of which is a reducer once the pipeline is put to use.

    State and memories of stages are kept side by side, each name prefixed by its stage's position.
    """

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        more = other.stages if isinstance(other, Pipeline) else (other,)
        return Pipeline(*self.stages, *more)

    def __repr__(self) -> str:
        return " >> ".join(repr(stage) for stage in self.stages)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.stages == other.stages

    def __hash__(self) -> int:
        return hash(self.stages)

    @property
    def reducer(self) -> Reducer:
        reducers = [stage for stage in self.stages if isinstance(stage, Reducer)]
        if len(reducers) != 1:
            raise ConfigurationError(
                f"a pipeline needs exactly one stage that makes one of many, such as Mean(); "
                f"{self!r} has {len(reducers)}"
            )
        return reducers[0]

    @property
    def _before(self) -> list[tuple[int, Stage]]:
        """Positions and stages that run on clients."""
        end = self.stages.index(self.reducer)
        return list(enumerate(self.stages))[: end + 1]

    @property
    def _after(self) -> list[tuple[int, Stage]]:
        end = self.stages.index(self.reducer)
        return list(enumerate(self.stages))[end + 1 :]

    @cached_property
    def transparent(self) -> bool:
        """Whether updates reach the reducer as the algorithm made them."""
        return all(
            type(stage).encode is Stage.encode and type(stage).decode is Stage.decode
            for _, stage in self._before
        )

    def check(self, reports: Sequence[str], weighted: bool) -> None:
        """Raise `ConfigurationError`, saying why, if these stages cannot work together."""
        _ = self.reducer
        for stage in self.stages:
            stage.check(self, reports, weighted)

    def init(self) -> Vectors:
        """The server's state of all stages."""
        return _join((position, stage.init()) for position, stage in enumerate(self.stages))

    def broadcast(self, state: Vectors) -> Vectors:
        """What clients must know of it."""
        return _join(
            (position, stage.broadcast(part(f"{position}/", state)))
            for position, stage in enumerate(self.stages)
        )

    def remember(self, schema: Schema) -> Vectors:
        """What a client's halves remember before its first round."""
        return _join((position, stage.remember(schema)) for position, stage in self._before)

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        """The client halves: from the algorithm's update to the message, and the new memory."""
        kept = {}
        for position, stage in self._before:
            update, kept[position] = stage.encode(
                update,
                part(f"{position}/", told),
                part(f"{position}/", memory),
                key.fold("stage", position),
            )
        return update, _join(kept.items())

    def decode(self, update: Update, schema: Schema) -> Update:
        """The server halves for one message, in reverse order."""
        for _, stage in reversed(self._before):
            update = stage.decode(update, schema)
        return update

    def open(self, schema: Schema) -> Accumulator:
        """An empty accumulator for one round."""
        return self.reducer.open(schema)

    def release(self, aggregate: Aggregate, state: Vectors, key: Key) -> tuple[Aggregate, Vectors]:
        """The server halves for the aggregate, and the stages' next state."""
        kept = {}
        for position, stage in [*self._after, *reversed(self._before)]:
            aggregate, kept[position] = stage.release(
                aggregate, part(f"{position}/", state), key.fold("stage", position)
            )
        return aggregate, _join(kept.items())


def as_pipeline(stages: Stage | Pipeline) -> Pipeline:
    """A pipeline from a single stage or a chain of them."""
    return stages if isinstance(stages, Pipeline) else Pipeline(stages)


def _join(parts: Iterable[tuple[int, Vectors]]) -> Vectors:
    joined: Vectors = {}
    for position, vectors in sorted(parts, key=lambda part: part[0]):
        joined |= prefixed(f"{position}/", vectors)
    return joined
