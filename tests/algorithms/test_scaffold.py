"""SCAFFOLD under rates that change, against its algorithm 1 written as a loop."""

from dataclasses import replace
from math import cos, pi

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.errors import ConfigurationError
from atoll.learners import NumpyLearner, rates

ROUNDS, STEPS, RATE = 6, 5, 0.2


def reference(clients, rate):
    """Karimireddy et al., ICML 2020, algorithm 1 with option II, on half the mean squared error.

    Float64; every client in every round, `STEPS` steps on all of its examples. `clients` are pairs
    of inputs [n, 2] and targets [n]; the answer is the weights [2] and the bias.
    """
    model, control, own = np.zeros(3), np.zeros(3), np.zeros((len(clients), 3))
    for round in range(1, ROUNDS + 1):
        ends, news = [], []
        for number, (x, y) in enumerate(clients):
            inputs, params = np.column_stack([x, np.ones(len(x))]), model.copy()
            for _ in range(STEPS):
                gradient = inputs.T @ (inputs @ params - y) / len(y)
                params -= rate(round) * (gradient - own[number] + control)
            ends.append(params)
            news.append(own[number] - control + (model - params) / (STEPS * rate(round)))
        model = np.mean(ends, axis=0)
        control += np.mean(news - own, axis=0)
        own = np.array(news)
    return model


@pytest.mark.parametrize(
    ("lr", "rate"),
    [
        (rates.Cosine(RATE, rounds=ROUNDS), lambda t: RATE * (1 + cos(pi * (t - 1) / ROUNDS)) / 2),
        (RATE, lambda t: RATE),
    ],
    ids=["cosine", "constant"],
)
def test_scaffold_is_its_paper_at_any_rate(lr, rate):
    rng = np.random.default_rng(0)
    slopes = {"a": (1.0, 2.0), "b": (-3.0, 0.5), "c": (0.0, -1.0)}
    held = {}
    for name, slope in slopes.items():
        x = rng.normal(size=(12, 2)).astype(np.float32)
        held[name] = (x, (x @ np.float32(slope) + 1).astype(np.float32))
    learner = NumpyLearner(
        layers=(2, 1), loss="squared", zero_init=True, lr=lr, batch_size=None, steps=STEPS
    )
    run = Federation(
        learner=learner,
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=ROUNDS),
    ).simulate(data.from_clients(held, task="regression", test=0.0))
    expected = reference(list(held.values()), rate)
    np.testing.assert_allclose(run.model["params"], expected, rtol=1e-5, atol=1e-6)


def test_a_rate_of_zero_is_refused_when_it_comes(blobs, federation):
    dead = NumpyLearner(layers=(2, 3), lr=lambda round: 0.0)
    with pytest.raises(ConfigurationError, match="is 0.0 in round 1"):
        replace(federation, learner=dead, algorithm=algorithms.Scaffold()).simulate(blobs)
