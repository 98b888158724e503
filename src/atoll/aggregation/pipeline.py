"""The pipeline at work: bound stages, from a client's update to the server's step.

States and memories of stages are trees by position, {"0": {...}}, without those that are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from atoll.aggregation.conversation import Conversation, Talk
from atoll.aggregation.schema import Schema
from atoll.aggregation.stage import (
    Accumulator,
    Pipeline,
    Reducer,
    Sampling,
    Setting,
    Stage,
    stages_of,
)
from atoll.aggregation.validate import validate
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Bounds, Sender, Update
from atoll.core.vectors import Layout, Tree, Vectors
from atoll.errors import CannotClose, ConfigurationError, UpdateRefused


def bind(
    given: Stage | Pipeline, schema: Schema, shared: Layout, sampling: Sampling
) -> BoundPipeline:
    """The stages as they work in a federation; `ConfigurationError` says why they cannot.

    Args:
        given: what people wrote.
        schema: what the algorithm reports.
        shared: the layout of what travels of the model.
        sampling: how the schedule draws its cohorts.
    """
    stages = stages_of(given)
    reducers = [place for place, stage in enumerate(stages) if isinstance(stage, Reducer)]
    if len(reducers) != 1:
        raise ConfigurationError(
            f"a pipeline needs exactly one stage that makes one of many, such as Mean(); "
            f"{Pipeline(*stages)!r} has {len(reducers)}"
        )
    end = reducers[0]
    bound: list[Stage] = []
    schemas, bounds = [schema], dict[tuple[str, ...], float]()
    for place, stage in enumerate(stages):
        here = schemas[place] if place < end else schema
        about = Setting(tuple(bound), stages[place + 1 :], here, bounds, shared, sampling)
        bound.append(stage.bind(about))
        if place <= end:
            schemas.append(schemas[-1].sent_as(bound[-1].sends(schemas[-1])))
            bounds = dict(bound[-1].bound(bounds, bound[-1].init(here)))
    if any(stage.hides_metrics for stage in bound):
        schemas = [replace(each, metrics={}) for each in schemas]
    return BoundPipeline(tuple(bound), end, tuple(schemas))


@dataclass(frozen=True, eq=False)
class BoundPipeline:
    """Stages that know where they stand; those up to the reducer at `end` run on clients.

    `schemas[i]` is what reaches the stage at position i on a client, the last one what travels.
    """

    stages: tuple[Stage, ...]
    end: int
    schemas: tuple[Schema, ...]

    @property
    def reducer(self) -> Reducer:
        found = self.stages[self.end]
        assert isinstance(found, Reducer)
        return found

    @property
    def message(self) -> Schema:
        """What travels as the answer to the question that is worked for."""
        return self.schemas[-1]

    @cached_property
    def gathers(self) -> Schema:
        """What the reducer's accumulator is given."""
        taken = self.reducer.takes(self.schemas[0])
        return replace(taken, metrics=self.message.metrics)

    @cached_property
    def transparent(self) -> bool:
        """Whether updates reach the reducer as the algorithm made them."""
        plain = all(
            type(stage).encode is Stage.encode
            and type(stage).decode is Stage.decode
            and type(stage).verify is Stage.verify
            for stage in self.stages[: self.end + 1]
        )
        return plain and type(self.reducer).seal is Reducer.seal

    @cached_property
    def covers(self) -> bool:
        """Whether a stage covers the aggregate with what only the server knows, as noise does."""
        return any(
            stage.secret and type(stage).release is not Stage.release for stage in self.stages
        )

    def init(self) -> Tree:
        """The server's state of all stages."""
        first = self.schemas[0]
        schemas = [*self.schemas[: self.end + 1], *[first] * (len(self.stages) - self.end - 1)]
        return _kept(s.init(schema) for s, schema in zip(self.stages, schemas, strict=True))

    def bounds(self, state: Tree) -> Bounds:
        """How large one update can be as the reducer gets it."""
        bounds: Bounds = {}
        for place, stage in enumerate(self.stages[: self.end + 1]):
            bounds = stage.bound(bounds, _of(state, place))
        return bounds

    def broadcast(self, state: Tree) -> Tree:
        """What clients must know of it."""
        return _kept(stage.broadcast(_of(state, at)) for at, stage in enumerate(self.stages))

    def remember(self) -> Tree:
        """What a client's halves remember before its first round."""
        clients = zip(self.stages[: self.end + 1], self.schemas, strict=False)
        return _kept(stage.remember(schema) for stage, schema in clients)

    def encode(
        self, update: Update, told: Tree, memory: Tree, key: Key, secret: Key
    ) -> tuple[Update, Tree]:
        """The client halves: from the algorithm's update to the message, and the new memory."""
        kept = []
        for place, stage in enumerate(self.stages[: self.end + 1]):
            own = (secret if stage.secret else key).fold("stage", place)
            update, after = stage.encode(update, _of(told, place), _of(memory, place), own)
            kept.append(after)
        known = self.message.metrics
        metrics = {name: value for name, value in update.metrics.items() if name in known}
        return replace(update, metrics=metrics), _kept(kept)

    def decode(self, message: Update, told: Tree) -> Update:
        """The server halves for one message, right to left; raises `UpdateRefused`, saying why."""
        if self.transparent:
            validate(message, self.gathers)
            return message
        validate(message, self.message)
        update = message
        for place, stage in reversed(list(enumerate(self.stages[: self.end + 1]))):
            try:
                update = stage.decode(update, self.schemas[place])
                update = stage.verify(update, _of(told, place))
            except UpdateRefused:
                raise
            except Exception as error:
                # Whatever a stranger's bytes do to a stage, the round must go on.
                name, text = type(stage).__name__.lstrip("_"), str(error).partition("\n")[0][:100]
                raise UpdateRefused(
                    f"{name} cannot read it ({type(error).__name__}: {text})"
                ) from error
        validate(update, self.gathers)
        return update

    def open(self) -> Accumulator:
        """An empty accumulator for one round."""
        return self.reducer.open(self.gathers)

    def talk(
        self, members: Sequence[Sender], population: int, state: Tree, key: Key
    ) -> Conversation:
        """The reducer's round, question by question."""
        own = Talk(tuple(members), population, _of(state, self.end), key.fold("reduce"))
        try:
            aggregate = yield from self.reducer.talk(self.gathers, own)
        except GeneratorExit:
            raise
        except Exception as error:
            # What clients sent must not be able to end a run.
            text = str(error).partition("\n")[0] or type(error).__name__
            raise CannotClose(f"{self.reducer!r} could not be closed: {text}") from error
        return replace(aggregate, bounds=self.bounds(state))

    def close(self, sums: Accumulator, population: int, state: Tree, key: Key) -> Aggregate:
        """What a reducer of one question makes of what was taken in."""
        own = _of(state, self.end)
        aggregate = sums.close(population, own, key.fold("reduce"))
        return replace(aggregate, bounds=self.bounds(state))

    def release(
        self, aggregate: Aggregate, state: Tree, key: Key, secret: Key
    ) -> tuple[Aggregate, Tree]:
        """The server halves for the aggregate, and the stages' next state."""
        places = [*range(self.end + 1, len(self.stages)), *reversed(range(self.end + 1))]
        kept: list[Vectors] = [{}] * len(self.stages)
        for place in places:
            stage = self.stages[place]
            own = (secret if stage.secret else key).fold("stage", place)
            aggregate, kept[place] = stage.release(aggregate, _of(state, place), own)
        return aggregate, _kept(kept)


def _of(tree: Tree, place: int) -> Vectors:
    found: Vectors = tree.get(str(place), {})
    return found


def _kept(parts: Iterable[Vectors]) -> Tree:
    return {str(place): vectors for place, vectors in enumerate(parts) if vectors}
