"""initial=: a run begins from the weights that are given."""

from dataclasses import replace

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.errors import AtollError
from atoll.learners import NumpyLearner

LR, STEPS = 0.1, 4
#: Two clients of one example each: x = 1, and 3 and 5 to hit.
TARGETS = (3.0, 5.0)


def line(rounds=1, **changes):
    """Half the mean squared error of w x + b; every client's step is on its one example."""
    plan = Federation(
        learner=NumpyLearner(
            layers=(1, 1), loss="squared", lr=LR, batch_size=None, steps=STEPS, zero_init=True
        ),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=rounds),
    )
    return replace(plan, **changes)


@pytest.fixture
def two():
    held = {f"{y}": (np.ones((1, 1), np.float32), np.float32([y])) for y in TARGETS}
    return data.from_clients(held, task="regression", test=0.0)


def by_hand(weight, bias, rounds=1):
    """Both move alike, so their sum s comes to s' = y + (1 - 2 lr)^steps (s - y)."""
    for _ in range(rounds):
        s, shrink = weight + bias, (1 - 2 * LR) ** STEPS
        change = np.mean([(y + shrink * (s - y) - s) / 2 for y in TARGETS])
        weight, bias = weight + change, bias + change
    return weight, bias


@pytest.mark.parametrize("start", [(0.0, 0.0), (7.0, -2.0), (-1.5, 0.25)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_run_begins_from_the_given_weights(two, start, rounds):
    plan = line(rounds)
    weight, bias = start
    named = plan.learner.layout.unpack({"params": np.float32([weight, bias])})
    sections = {"params": np.float32([weight, bias])}
    for initial in (named, sections):
        run = plan.simulate(two, initial=initial)
        np.testing.assert_allclose(run.model["params"], by_hand(weight, bias, rounds), rtol=1e-5)
    # What was given is left as it is.
    assert sections["params"].tolist() == [weight, bias]


def test_rounds_after_rounds_of_another_run_are_one_run(two):
    """Nothing but the model is kept by FedAvg, and nothing is drawn here."""
    first = line(2).simulate(two)
    second = line(3).simulate(two, initial=first)
    np.testing.assert_allclose(second.model["params"], by_hand(0, 0, 5), rtol=1e-5)
    assert first.model["params"].tolist() == line(2).simulate(two).model["params"].tolist()


def test_clients_parts_begin_from_it_too(blobs):
    """With every array private, a client that never trained evaluates the given weights."""
    learner = NumpyLearner(layers=(2, 3), lr=0.1)
    plan = Federation(
        learner=learner,
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1, cohort=1),
        private=("*",),
    )
    good = Federation(
        learner=learner, algorithm=algorithms.FedAvg(), schedule=schedules.Synchronous(rounds=20)
    ).simulate(blobs)
    given = plan.simulate(blobs, initial=good)
    alone = plan.simulate(blobs)
    assert given.metrics["accuracy_client_mean"] > 0.8 > alone.metrics["accuracy_client_mean"]


def test_it_is_kept_with_the_run(two, tmp_path):
    plan, start = line(4), {"params": np.float32([7, -2])}
    whole = plan.simulate(two, initial=start, engine="sequential")
    half = line(2).simulate(two, initial=start, engine="sequential", folder=tmp_path / "run")
    assert "initial" in half.config
    rest = plan.simulate(two, initial=start, folder=tmp_path / "run", resume=True)
    assert rest.model["params"].tobytes() == whole.model["params"].tobytes()


@pytest.mark.parametrize(
    "initial",
    [
        {"params": np.zeros(3, np.float32)},
        {"w": np.zeros(2)},
        {},
        7,
        "weights.bin",
        {"params": np.float32([np.nan, 0])},
    ],
)
def test_what_is_no_model_of_this_kind_is_refused(two, initial):
    with pytest.raises(AtollError):
        line().simulate(two, initial=initial)
