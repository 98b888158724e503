"""The server's side of a round in vectors: broadcast, receive, aggregate, step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from atoll.aggregation.stage import Accumulator
from atoll.core.random import Key
from atoll.core.vectors import Vector, Vectors, describe_names, part, prefixed
from atoll.errors import CheckpointError, RunError
from atoll.rounds.plan import Plan

STAGE = "stage/"


@dataclass
class Server:
    """The state of a federation's model, between rounds and within one.

    `state` is the algorithm's, `statistics` are the model's buffers and counters, `stages` is the
    pipeline's. None of them is changed in place: each round makes new ones.
    """

    plan: Plan
    key: Key
    state: Vectors = field(init=False)
    statistics: Vectors = field(init=False)
    stages: Vectors = field(init=False)
    _accumulator: Accumulator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        model = self.plan.learner.init(self.key.fold("init"))
        self.plan.learner.layout.check(model)
        self.state = self.plan.algorithm.init(model.pop("params"))
        self.statistics = model
        self.stages = self.plan.stages.init()

    def model(self) -> Vectors:
        """The current model."""
        return {"params": self.state["params"], **self.statistics}

    def broadcast(self) -> Vectors:
        """What every client of a round receives: named vectors, those of stages prefixed."""
        told = self.plan.stages.broadcast(self.stages)
        return {
            **self.plan.algorithm.broadcast(self.state),
            **self.statistics,
            **prefixed(STAGE, told),
        }

    def open(self) -> None:
        """Begin to aggregate a round; what an abandoned attempt had gathered is dropped."""
        self._accumulator = self.plan.stages.open(self.plan.schema)

    @property
    def sums(self) -> Accumulator:
        """What the open round has gathered so far."""
        assert self._accumulator is not None, "the round is not open"
        return self._accumulator

    def close(
        self, round: int, population: int, pulled: tuple[float, Vector] | None = None
    ) -> dict[str, float]:
        """Step to the next model; returns the round's measurements.

        `pulled` is the discount of a single update and the parameters that it began from: the
        model is then moved towards the client's own (see `schedules.Buffered.pull`).
        """
        aggregate = self.sums.close(population)
        self._accumulator = None
        if pulled is not None:
            discount, began = pulled
            drift = np.float32(discount) * (began - self.state["params"])
            vectors = {**aggregate.vectors, "delta": aggregate["delta"] + drift}
            aggregate = replace(aggregate, vectors=vectors)
        aggregate, self.stages = self.plan.stages.release(
            aggregate, self.stages, self.key.fold("release", round)
        )
        self.state = _alike(self.plan.algorithm.step(self.state, aggregate), self.state)
        self.statistics = {
            name: vector + aggregate.statistics[name] for name, vector in self.statistics.items()
        }
        return dict(aggregate.measurements)

    def vectors(self) -> Vectors:
        """Everything that `restore` needs."""
        return {
            **prefixed("state/", self.state),
            **prefixed("statistics/", self.statistics),
            **prefixed("stages/", self.stages),
        }

    def restore(self, vectors: Vectors) -> None:
        """Go on from what `vectors` gave; raises `CheckpointError` if it is another model's."""
        present = self.vectors()
        for name in sorted(set(present) ^ set(vectors)):
            raise CheckpointError(
                f"the checkpoint is of another federation: {name!r} is only in one of the two"
            )
        for name, vector in vectors.items():
            if vector.shape != present[name].shape or vector.dtype != present[name].dtype:
                raise CheckpointError(
                    f"the checkpoint is of another federation: {name!r} has another shape"
                )
        self.state = part("state/", vectors)
        self.statistics = part("statistics/", vectors)
        self.stages = part("stages/", vectors)


def _alike(state: Vectors, before: Vectors) -> Vectors:
    """The new state in the dtypes of the old one, whatever number types a rule mixed in."""
    if state.keys() != before.keys():
        raise RunError(
            f"the algorithm's step made {describe_names(state)} of {describe_names(before)}; it "
            "must give every vector of its state"
        )
    return {name: np.asarray(vector, before[name].dtype) for name, vector in state.items()}
