"""A reducer of one's own, as the documentation shows it, on models with statistics and buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Gathered, Mean, Reducer, Stage
from atoll.core.updates import Aggregate
from atoll.errors import ConfigurationError, RunError
from atoll.learners import NumpyLearner


class Rows(Gathered):
    """The median of each number."""

    def fresh(self):
        return Rows()

    def close(self, population, state, key):
        answers = list(self.answers.values())
        middle = {
            kind: {
                name: np.median([getattr(each, kind)[name] for each in answers], axis=0)
                for name in getattr(answers[0], kind)
            }
            for kind in ("vectors", "statistics")
        }
        count = len(answers)
        return Aggregate(**middle, weight=count, count=count, population=population)


@dataclass(frozen=True)
class Median(Reducer):
    def fewest(self):
        return 3

    def open(self, schema):
        return Rows()


def test_counters_stay_whole_numbers_and_the_run_can_go_on(tmp_path):
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    layers = (
        torch.nn.Linear(64, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 10),
    )
    plan = Federation(
        learner=TorchLearner(torch.nn.Sequential(*layers), lr=0.1, batch_size=10),
        algorithm=algorithms.FedAvg(weighting="uniform"),
        schedule=schedules.Synchronous(rounds=2, minimum=3),
        pipeline=Median(),
    )
    clients = data.load("digits").dirichlet(clients=6, alpha=5.0, seed=0)
    run = plan.simulate(clients, folder=tmp_path / "r")
    assert run.model["counters"].dtype == np.int64 and run.model["counters"].min() > 0
    assert run.model["params"].dtype == np.float32 == run.model["buffers"].dtype
    longer = replace(plan, schedule=schedules.Synchronous(rounds=4, minimum=3))
    assert len(longer.simulate(clients, folder=tmp_path / "r", resume=True).history) == 4


def test_a_buffer_closes_with_all_it_holds(blobs):
    plan = Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1),
        algorithm=algorithms.FedAvg(weighting="uniform"),
        schedule=schedules.Buffered(rounds=3, concurrency=5, buffer=4),
        pipeline=Median(),
    )
    assert [record.accepted for record in plan.simulate(blobs).history] == [4, 4, 4]
    with pytest.raises(ConfigurationError, match="needs 3 updates"):
        replace(plan, schedule=schedules.Buffered(rounds=3, concurrency=5, buffer=2))


@dataclass(frozen=True)
class Noise(Stage):
    """Covers the aggregate with noise that only the server knows."""

    secret = True
    hides_metrics = True

    def release(self, aggregate, state, key):
        rng = key.generator()
        covered = {
            name: vector + rng.standard_normal(vector.shape).astype(np.float32)
            for name, vector in aggregate.vectors.items()
        }
        return replace(aggregate, vectors=covered), state


@dataclass(frozen=True, kw_only=True)
class Twice(algorithms.FedAvg):
    """Tells everyone the mean of a first pass."""

    def talk(self, state, talk):
        first = yield algorithms.Gather({})
        return (yield algorithms.Gather({"direction": first["delta"]}))


@dataclass(frozen=True, kw_only=True)
class Once(algorithms.FedAvg):
    """One pass, asked for in a conversation."""

    def talk(self, state, talk):
        return (yield algorithms.Gather({}))


def test_nobody_is_told_an_aggregate_that_noise_has_not_covered(blobs, federation):
    twice = replace(federation, algorithm=Twice())
    twice.simulate(blobs)
    with pytest.raises(RunError, match="could tell clients the aggregate before"):
        replace(twice, pipeline=Mean() >> Noise()).simulate(blobs)
    replace(federation, algorithm=Once(), pipeline=Mean() >> Noise()).simulate(blobs)
