"""The plan: what all parties of a federation agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from atoll.aggregation.mean import Mean
from atoll.aggregation.pipeline import Pipeline, as_pipeline
from atoll.aggregation.stage import Schema, Stage
from atoll.algorithms.algorithm import Algorithm
from atoll.errors import ConfigurationError
from atoll.learners.base import Learner
from atoll.rounds.schedules import Buffered, Schedule


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When the model is measured, and on whose data.

    Args:
        every: rounds between evaluations on the global test part; the last is always evaluated.
        clients_every: rounds between evaluations on every client's own test part, for the spread
            over clients; None never does, the last round included.
        spread: metrics whose spread is reported; None is accuracy, or the loss where there is none.
        best: the metric that decides which model is the best; None is the same choice.
    """

    every: int = 1
    clients_every: int | None = 10
    spread: tuple[str, ...] | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.clients_every is not None and self.clients_every < 1):
            raise ConfigurationError("evaluation intervals must be at least 1 round")
        named = self.spread is None or isinstance(self.spread, list | tuple)
        if not named or not all(isinstance(name, str) for name in self.spread or ()):
            raise ConfigurationError(
                f"spread must be names of metrics, e.g. ('accuracy', 'loss'), not {self.spread!r}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A federation's description: learner, algorithm, pipeline, schedule, evaluation."""

    learner: Learner
    algorithm: Algorithm
    schedule: Schedule
    pipeline: Stage | Pipeline = field(default_factory=Mean)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        for name, kind in (
            ("learner", Learner),
            ("algorithm", Algorithm),
            ("schedule", Schedule),
            ("pipeline", Stage | Pipeline),
            ("evaluation", Evaluation),
        ):
            if not isinstance(getattr(self, name), kind):
                given = getattr(self, name)
                hint = "; call it to make one" if isinstance(given, type) else ""
                raise ConfigurationError(
                    f"{name} must be one of atoll's {name}s, not {given!r}{hint}"
                )
        if getattr(self.schedule, "pull", False) and "delta" not in self.algorithm.reports:
            raise ConfigurationError("pull=True needs an algorithm that reports a delta")
        statistics = [s for s in self.learner.layout.sizes if s != "params"]
        if isinstance(self.schedule, Buffered) and statistics:
            raise ConfigurationError(
                f"the model has {' and '.join(statistics)} (BatchNorm's statistics, say), which an "
                "asynchronous schedule would add up from different versions; use GroupNorm or "
                "LayerNorm, or a Synchronous schedule"
            )
        self.algorithm.check(self.learner)
        self.stages.check(self.algorithm.reports, self.algorithm.weighted)

    @cached_property
    def stages(self) -> Pipeline:
        """The pipeline, also where it is a single stage."""
        return as_pipeline(self.pipeline)

    @cached_property
    def schema(self) -> Schema:
        """What every update must hold."""
        return Schema.of(self.learner.layout, self.algorithm.reports)
