"""A rule that writes into what it is given is refused: others are given the same array."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from atoll import Federation, data, schedules
from atoll.algorithms import FedAvg, LocalRule
from atoll.errors import RunError
from atoll.learners import NumpyLearner, TorchLearner

X = np.random.default_rng(0).normal(size=(80, 6)).astype("f")
CLIENTS = data.from_arrays(X, (X[:, 0] > 0).astype(int)).iid(clients=4)


class Copying(LocalRule):
    def remember(self, got, shared):
        return {"sum": np.zeros(shared.size, np.float32)}

    def finish(self, client, local, got, mine):
        change = local.params - got["params"]
        return {"delta": change}, {"sum": mine["sum"] + change}


class WritesModel(Copying):
    def finish(self, client, local, got, mine):
        got["params"] *= -1
        return {"delta": got["params"] + local.params}, mine


class WritesMemory(Copying):
    def finish(self, client, local, got, mine):
        change = local.params - got["params"]
        mine["sum"] += change
        return {"delta": change}, mine


class WritesBefore(Copying):
    def correction(self, got, mine):
        got["params"][..., 0] = 0


def frozen():
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    return TorchLearner(module, weights="given", lr=0.1)


LEARNERS = {
    "numpy": lambda: NumpyLearner(layers=(6, 2), lr=0.1),
    "torch": lambda: TorchLearner(nn.Linear(6, 2), lr=0.1),
    "torch by autograd": frozen,
}


def simulated(learner, rule, engine):
    return Federation(
        learner=learner, algorithm=FedAvg(local=rule), schedule=schedules.Synchronous(rounds=2)
    ).simulate(CLIENTS, engine=engine)


CASES = [(name, "sequential") for name in LEARNERS] + [("torch", "stacked")]


@pytest.mark.parametrize(("learner", "engine"), CASES)
@pytest.mark.parametrize("rule", [WritesModel(), WritesMemory(), WritesBefore()], ids=repr)
def test_writing_into_what_is_lent_is_refused(learner, engine, rule):
    with pytest.raises(RunError, match="compute a new one instead"):
        simulated(LEARNERS[learner](), rule, engine)


@pytest.mark.parametrize(("learner", "engine"), CASES)
def test_new_arrays_are_fine(learner, engine):
    assert len(simulated(LEARNERS[learner](), Copying(), engine).history) == 2
