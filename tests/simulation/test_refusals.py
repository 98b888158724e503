"""What a run cannot go on with gets a sentence, and what it can is left out."""

from dataclasses import replace

import numpy as np
import pytest

from atoll import algorithms, data
from atoll.errors import ConfigurationError, DataError, RunError
from atoll.learners import NumpyLearner
from atoll.simulation import LogNormal, RandomDevices


def test_diverging_runs_say_so(blobs, federation):
    learner = NumpyLearner(layers=(2, 4, 3), lr=1e30)
    with (
        pytest.raises(RunError, match=r"NaN or infinite .* try a smaller lr"),
        np.errstate(all="ignore"),
    ):
        replace(federation, learner=learner).simulate(blobs)


def test_bad_calls_get_a_sentence(blobs, federation, tmp_path):
    with pytest.raises(ConfigurationError, match="devices must be Devices"):
        federation.simulate(blobs, devices=RandomDevices)
    with pytest.raises(ConfigurationError, match="seed must be a whole number"):
        federation.simulate(blobs, seed=1.5)
    with pytest.raises(DataError, match="clients must be a whole number"):
        data.from_arrays(np.zeros((9, 1)), np.zeros(9, int), classes=1).iid(clients=2.5)
    run = federation.simulate(blobs)
    with pytest.raises(ConfigurationError, match="cannot be drawn"):
        run.plot(tmp_path / "a.xyz")
    with pytest.raises(DataError, match="median must be positive"):
        LogNormal(median=-1.0)


def test_wild_metrics_do_not_end_a_run(blobs, federation):
    class Wild(algorithms.FedAvg):
        metrics = dict.fromkeys(("wild", "nan", "fine"), (-np.inf, np.inf))

        def report(self, local, **vectors):
            wild = {"wild": 1e300, "nan": float("nan"), "fine": 2.0}
            return replace(super().report(local, **vectors), metrics=wild)

    run = replace(federation, algorithm=Wild()).simulate(blobs)
    assert [record.accepted for record in run.history] == [4] * 6
    assert [record.measurements["fine"] for record in run.history] == [2.0] * 6
    assert not {"wild", "nan"} & {name for record in run.history for name in record.measurements}
