"""Simulations in threads of one process: the bytes are those of one after the other."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key
from atoll.learners import TorchLearner

SEEDS = range(4)


def clients():
    x = np.random.default_rng(0).normal(size=(160, 6)).astype("f")
    return data.from_arrays(x, (x[:, 0] > 0).astype(int)).dirichlet(clients=5, alpha=0.5)


CLIENTS = clients()


def module(frozen, dropout):
    made = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))
    if frozen:
        nn.init.constant_(made[0].weight, 0.1).requires_grad_(False)
    return made


def federation(frozen, dropout):
    return Federation(
        learner=TorchLearner(module(frozen, dropout), lr=0.1, batch_size=8, weights="seeded"),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=4),
    )


def params(plan, seed):
    return plan.simulate(CLIENTS, seed=seed).model["params"].tobytes()


@pytest.mark.parametrize("frozen", [False, True], ids=["stacked", "one resident module"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shared", [False, True], ids=["a learner each", "one learner"])
def test_sweeps_in_threads_make_the_same_bytes(frozen, dropout, shared):
    one = federation(frozen, dropout)
    expected = [params(one, seed) for seed in SEEDS]
    # Made before: a module that is made draws from torch's one generator, whoever uses it.
    plans = [one if shared else federation(frozen, dropout) for _ in SEEDS]

    def swept(seed):
        return params(plans[seed], seed)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(swept, SEEDS)) == expected


def test_initial_models_drawn_in_threads_are_the_seeds():
    learner = TorchLearner(nn.Sequential(*[nn.Linear(30, 30) for _ in range(20)]))
    alone = [learner.init(Key(seed))["params"].tobytes() for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        drawn = pool.map(lambda seed: learner.init(Key(seed))["params"].tobytes(), range(8))
        assert list(drawn) == alone
