"""The plan: what all parties of a federation agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from atoll.aggregation.mean import Mean
from atoll.aggregation.pipeline import BoundPipeline, bind
from atoll.aggregation.schema import WEIGHT_LEAST, WEIGHT_LIMIT, Schema
from atoll.aggregation.stage import Pipeline, Stage
from atoll.algorithms.algorithm import Algorithm
from atoll.core.vectors import Split
from atoll.data.encoding.encoding import Encoding
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.errors import ConfigurationError, DataError, LayoutError
from atoll.learners.base import Learner
from atoll.rounds.download import Download
from atoll.rounds.schedules import Schedule
from atoll.rounds.stopping import StopRule


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When the model is measured, and on whose data.

    Args:
        every: rounds between evaluations on the global test part; the last is always evaluated.
        clients_every: rounds between evaluations on every client's own test part, with the model
            that the client itself would use, for the spread over clients; None never does, the
            last round included.
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
    """What all parties of a federation agree on.

    Args:
        learner: the model and how one client trains and evaluates it.
        algorithm: what clients do with what they receive, and what the server does in return.
        schedule: how many rounds, who is asked, when a round ends.
        pipeline: what happens to updates on their way, e.g. `Clip(1.0) >> Mean()`.
        evaluation: when the model is measured, and on whose data.
        private: patterns of the model's arrays that stay with each client and never travel, e.g.
            ("head.*",); ("*",) is local training.
        public: examples that everyone may see, for algorithms that learn from them.
        download: stages that the model goes through on its way to clients, e.g. `Quantize(8)`.
        stop: rules that end a run before its last round, e.g. (stopping.Patience(10),).
        encoding: what columns and labels of tables mean, at every client; None leaves it to them.
    """

    learner: Learner
    algorithm: Algorithm
    schedule: Schedule
    pipeline: Stage | Pipeline = field(default_factory=Mean)
    evaluation: Evaluation = field(default_factory=Evaluation)
    private: tuple[str, ...] = ()
    public: Examples | None = None
    download: Stage | Pipeline | None = None
    stop: tuple[StopRule, ...] = ()
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("learner", Learner),
            ("algorithm", Algorithm),
            ("schedule", Schedule),
            ("pipeline", Stage | Pipeline),
            ("evaluation", Evaluation),
            ("public", Examples | None),
            ("download", Stage | Pipeline | None),
            ("encoding", Encoding | None),
        ):
            if not isinstance(getattr(self, name), kind):
                given = getattr(self, name)
                hint = "; call it to make one" if isinstance(given, type) else ""
                raise ConfigurationError(
                    f"{name} must be one of atoll's {name}s, not {given!r}{hint}"
                )
        patterns: object = self.private
        if not isinstance(patterns, tuple | list) or not all(isinstance(p, str) for p in patterns):
            raise ConfigurationError(
                f"private must be patterns, e.g. ('head.*',), not {patterns!r}"
            )
        if isinstance(self.stop, StopRule):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(rule, StopRule) for rule in self.stop):
            raise ConfigurationError(f"stop must be rules of atoll.stopping, not {self.stop!r}")
        own = {name: metric.higher for name, metric in (self.learner.metrics or {}).items()}
        object.__setattr__(self, "stop", tuple(rule.knowing(own) for rule in self.stop))
        self.schedule.check(self.algorithm.reports(self.split.shared), self.split.shared)
        self.algorithm.check(self.learner)
        self._check_reducer()
        _ = self.downward

    def check_data(self, data: FederatedData) -> None:
        """Refuse data that are not encoded as was agreed, or that the learner cannot take."""
        agreed, own = self.encoding, data.encoding
        if agreed is not None and own is None:
            raise DataError(
                f"{data.name} is not encoded as the federation's encoding says: read it with "
                "data.from_table(..., encoding=federation.encoding)"
            )
        if agreed is not None and own is not None and own.digest != agreed.digest:
            how = own.difference(agreed, data.name, "the federation")
            raise DataError(f"{data.name} is encoded in another way than was agreed: {how}")
        self.learner.check(data)

    def _check_reducer(self) -> None:
        reducer = self.stages.reducer
        several = self.several
        if several and not self.schedule.lockstep:
            raise ConfigurationError(
                f"a round of {reducer if reducer.several else self.algorithm!r} is several "
                "questions to the same clients, which an asynchronous schedule has not: use "
                "Synchronous"
            )
        fewest, most = reducer.fewest(), self.schedule.sampling().cohort
        # A buffer closes with all it is to hold.
        lockstep = self.schedule.lockstep
        have = self.schedule.fewest(most) if lockstep and most is not None else most
        if fewest > 1 and most is not None and have is not None and have < fewest:
            more = f"minimum={fewest}" if most >= fewest else f"cohort={fewest}"
            raise ConfigurationError(
                f"{reducer!r} needs {fewest} updates, but a round may close with {have}; set "
                f"{more} or more"
            )

    @cached_property
    def split(self) -> Split:
        """The model's layout in what is shared and what stays with clients."""
        try:
            return Split.of(self.learner.layout, self.private)
        except LayoutError as error:
            raise ConfigurationError(f"private: {error}") from None

    @cached_property
    def schema(self) -> Schema:
        """What every update of the algorithm must hold."""
        algorithm, shared = self.algorithm, self.split.shared
        return Schema.of(
            algorithm.reports(shared),
            shared,
            weights=(WEIGHT_LEAST, WEIGHT_LIMIT) if algorithm.weighted else (1.0, 1.0),
            metrics=dict(algorithm.metrics),
        )

    @cached_property
    def stages(self) -> BoundPipeline:
        """The pipeline as it works in this federation."""
        return bind(self.pipeline, self.schema, self.split.shared, self.schedule.sampling())

    @cached_property
    def downward(self) -> Download | None:
        """The download pipeline as it works in this federation, if there is one."""
        if self.download is None:
            return None
        return Download.bind(self.download, self.split.shared, self.schedule.sampling())

    @property
    def several(self) -> bool:
        """Whether a round is more than one question."""
        return self.algorithm.several or self.stages.reducer.several
