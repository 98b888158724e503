"""Steps in pieces: the same bytes as whole, for every named algorithm, and only where it may be."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from atoll import Federation, algorithms, schedules
from atoll.aggregation import Mean
from atoll.algorithms import server as optimisers
from atoll.core import room
from atoll.core.random import Key
from atoll.core.updates import Aggregate
from atoll.learners import NumpyLearner
from atoll.rounds.server import Server

NAMED = {
    "fedavg": algorithms.FedAvg(),
    "slow": algorithms.FedAvg(server=optimisers.SGD(0.7)),
    "fedprox": algorithms.FedProx(0.1),
    "fedavgm": algorithms.FedAvgM(),
    "fedadagrad": algorithms.FedAdagrad(),
    "fedadam": algorithms.FedAdam(),
    "fedyogi": algorithms.FedYogi(),
    "fedsgd": algorithms.FedSGD(lr=0.3),
    "scaffold": algorithms.Scaffold(),
    "scaffold-adam": algorithms.Scaffold(server=optimisers.Adam()),
}


def served(algorithm):
    plan = Federation(
        learner=NumpyLearner(layers=(31, 17, 5), lr=0.1),
        algorithm=algorithm,
        pipeline=Mean(),
        schedule=schedules.Synchronous(rounds=3),
    )
    return Server(plan, Key(0))


def stepped(algorithm, rounds=3):
    """The state after some rounds of random means."""
    server, rng = served(algorithm), np.random.default_rng(1)
    for round in range(1, rounds + 1):
        vectors = {
            name: rng.standard_normal(spec.size, dtype=np.float32)
            for name, spec in server.plan.schema.vectors.items()
        }
        server.close(round, Aggregate(vectors, {}, 10.0, 4, 9))
    return server.vectors()


@pytest.mark.parametrize("name", NAMED)
def test_a_step_in_pieces_is_the_same_bytes(name, monkeypatch, tmp_path):
    whole = stepped(NAMED[name])
    monkeypatch.setattr(room, "LARGE", 256)
    monkeypatch.setattr(room, "STEP", 400)  # 100 values, of which 639 are no multiple
    asked = []
    step = type(NAMED[name]).step

    def counted(self, state, mean, server):
        asked.append(len(state["params"]))
        return step(self, state, mean, server)

    monkeypatch.setattr(algorithms.FedAvg, "step", counted)
    with room.room_in(tmp_path):
        pieces = stepped(NAMED[name])
    assert pieces.keys() == whole.keys()
    assert max(asked) == 100 and len(set(asked)) == 2
    assert all(pieces[key].tobytes() == whole[key].tobytes() for key in whole)


@dataclass(frozen=True)
class Normed(optimisers.Adam):
    """A rule that looks at the whole vector, derived from one that does not."""

    def second(self, second, squared):
        return second * 0 + squared.mean()


@dataclass(frozen=True)
class Renamed(optimisers.Momentum):
    """Momentum by another name."""


@dataclass(frozen=True)
class Said(Normed):
    """One whose author knows better."""

    elementwise: ClassVar[bool] = True


class Whole(algorithms.FedAvg):
    def step(self, state, mean, server):
        return super().step(state, mean, server)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        *((algorithm, True) for algorithm in NAMED.values()),
        (algorithms.FedAvg(server=Normed()), False),
        (algorithms.FedAvg(server=Renamed()), True),
        (algorithms.FedAvg(server=Said()), True),
        (Whole(), False),
    ],
)
def test_what_is_derived_must_say_itself_that_it_is_elementwise(algorithm, expected):
    assert algorithm.elementwise is expected


def test_what_is_not_elementwise_is_stepped_whole(monkeypatch):
    monkeypatch.setattr(room, "LARGE", 256)
    whole = stepped(algorithms.FedAvg(server=Normed()), 1)
    assert len(set(whole["state/server.second"].tolist())) == 1


@dataclass(frozen=True)
class Optimistic(optimisers.ServerOptimizer):
    """Keeps the mean change as it came: x + 2 d_t - d_(t-1)."""

    elementwise: ClassVar[bool] = True

    def init(self, params):
        return {"last": np.zeros_like(params)}

    def step(self, params, delta, memory):
        return params + 2 * delta - memory["last"], {"last": delta}


def test_what_is_kept_of_the_mean_is_not_overwritten_by_the_next_model(monkeypatch, tmp_path):
    algorithm = algorithms.FedAvg(server=Optimistic(1.0))
    whole = stepped(algorithm)
    monkeypatch.setattr(room, "LARGE", 256)
    monkeypatch.setattr(room, "STEP", 400)
    with room.room_in(tmp_path):
        pieces = stepped(algorithm)
    assert all(pieces[key].tobytes() == whole[key].tobytes() for key in whole)
    rng = np.random.default_rng(1)
    draws = [rng.standard_normal(634, dtype=np.float32) for _ in range(3)]
    np.testing.assert_array_equal(pieces["state/server.last"], draws[-1])
