"""Shared fixtures: small federations that are quick to run."""

from __future__ import annotations

import os
import signal

# Started in the background, a shell has its jobs ignore Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before numpy and torch start their thread pools: two cores, small matrices.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np
import pytest
from hypothesis import settings

from atoll import Federation, algorithms, data, schedules
from atoll.data import FederatedData
from atoll.learners import NumpyLearner

# The suite draws the same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=60)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def digits() -> FederatedData:
    """Twelve clients with skewed labels of scikit-learn's digits."""
    pytest.importorskip("sklearn")
    return data.load("digits").dirichlet(clients=12, alpha=0.3, seed=0)


@pytest.fixture(scope="session")
def blobs() -> FederatedData:
    """Eight clients with three Gaussian classes in the plane."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    x = rng.normal(size=(240, 2)) + 3 * np.stack([np.cos(2.1 * y), np.sin(2.1 * y)], axis=1)
    return data.from_arrays(x.astype(np.float32), y, classes=3, name="blobs").dirichlet(
        clients=8, alpha=0.5, seed=0
    )


@pytest.fixture
def federation() -> Federation:
    """Softmax regression for the blobs, four of eight clients in each of six rounds."""
    return Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=6, cohort=4),
    )
