"""An asynchronous run ends in a sentence where nobody can deliver, whatever is in the way."""

import math

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.errors import DataError, RunError
from atoll.learners import NumpyLearner
from atoll.simulation import asynchronous
from atoll.simulation.devices import RandomDevices, Trace, TracedDevices

X = np.random.default_rng(0).normal(size=(60, 4)).astype("f")
CLIENTS = data.from_arrays(X, (X[:, 0] > 0).astype(int)).iid(clients=6)


def plan(**settings):
    return Federation(
        learner=NumpyLearner(layers=(4, 2), batch_size=4),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Buffered(rounds=3, concurrency=3, buffer=2, **settings),
    )


def windows(length, **settings):
    """Everybody is there for so many seconds out of a hundred, and takes one or two to train."""
    trace = Trace(((0.0, length),), steps_per_second=1.0)
    return TracedDevices(dict.fromkeys(CLIENTS.names, trace), period=100.0, **settings)


NOBODY = {
    "drop-outs": RandomDevices(dropout=1.0),
    "availability": RandomDevices(availability=0.0),
    "windows": windows(0.5),
}


@pytest.mark.parametrize("devices", NOBODY.values(), ids=NOBODY)
def test_a_run_in_which_nobody_delivers_ends(devices):
    with pytest.raises(RunError, match="nobody could be invited or the client delivered nothing"):
        plan().simulate(CLIENTS, devices=devices)


@pytest.mark.parametrize(
    "devices", [RandomDevices(dropout=0.99), RandomDevices(availability=0.001), windows(50.0)]
)
def test_patience_is_enough_for_the_rare_ones(devices):
    assert len(plan().simulate(CLIENTS, devices=devices).history) == 3


def test_deliveries_begin_the_count_anew(monkeypatch):
    monkeypatch.setattr(asynchronous, "FRUITLESS", 40)
    run = plan().simulate(CLIENTS, devices=RandomDevices(dropout=0.7), seed=1)
    assert len(run.history) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"jitter": math.nan}, {"latency": -1}, {"period": 0}, {"period": math.inf}, {"dropout": 1.5},
     {"availability": math.nan}, {"charging": "yes"}],
)  # fmt: skip
def test_devices_that_mean_nothing_are_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        RandomDevices(**wrong)
