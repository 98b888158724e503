"""Settings of algorithms: what is a number, and what is none."""

from dataclasses import replace

import numpy as np
import pytest

from atoll import algorithms
from atoll.errors import ConfigurationError
from atoll.learners import NumpyLearner
from atoll.tracking import RunFolder


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda lr: algorithms.FedAvg(server=algorithms.server.SGD(lr)), 0.7),
        (lambda lr: algorithms.FedAdam(server_lr=lr), 0.1),
        (lambda momentum: algorithms.FedAvgM(momentum=momentum), 0.5),
        (lambda lr: algorithms.FedSGD(lr=lr), 0.5),
        (algorithms.FedProx, 0.1),
    ],
    ids=["server rate", "fedadam", "momentum", "fedsgd", "mu"],
)
def test_numpy_numbers_are_numbers(blobs, federation, make, value):
    """A float64 of NumPy is Python's number of that value: the same run, described alike."""
    plain, theirs = (
        replace(federation, algorithm=make(number)) for number in (value, np.float64(value))
    )
    assert theirs.describe() == plain.describe()
    expected, found = plain.simulate(blobs), theirs.simulate(blobs)
    assert found.model["params"].dtype == np.float32
    # Not to the byte: a step in float64 is rounded once, one in float32 at every operation.
    np.testing.assert_allclose(found.model["params"], expected.model["params"], rtol=1e-4)
    assert found.bytes_up == expected.bytes_up
    # The number counts: another one gives another model.
    other = replace(federation, algorithm=make(np.float64(value / 2))).simulate(blobs)
    assert np.abs(other.model["params"] / expected.model["params"] - 1).max() > 1e-2


@pytest.mark.parametrize(
    "make",
    [
        lambda: algorithms.FedProx(mu=-1.0),
        lambda: algorithms.FedProx(mu=float("nan")),
        lambda: algorithms.FedProx(mu="0.1"),
        lambda: algorithms.FedSGD(lr=-1.0),
        lambda: algorithms.server.SGD(float("inf")),
        lambda: algorithms.server.Momentum(momentum=1.0),
        lambda: algorithms.FedAvg(server=algorithms.server.SGD),
        lambda: NumpyLearner(layers=(2, 3), lr=float("inf")),
        lambda: RunFolder("x", every=0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()
