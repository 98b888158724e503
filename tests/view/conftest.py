"""Runs to look at, and a browser to look with."""

from __future__ import annotations

import pytest
from browser import browser as started_browser

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.simulation import RandomDevices
from atoll.view.page.local import LocalPage


@pytest.fixture(scope="module")
def browser():
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of digits that differ in one setting, with clients who do not deliver."""
    root = tmp_path_factory.mktemp("runs")
    clients = data.load("digits").dirichlet(clients=12, alpha=0.3, seed=0)
    for name, lr in (("quick", 1.0), ("slow", 0.3)):
        federation = Federation(
            learner=NumpyLearner(layers=(64, 10), lr=0.1, batch_size=16),
            algorithm=algorithms.FedAvg(server=algorithms.server.SGD(lr)),
            schedule=schedules.Synchronous(rounds=12, cohort=6, minimum=2, deadline=60.0),
            evaluation=Evaluation(clients_every=4, spread=("accuracy", "loss")),
        )
        federation.simulate(clients, folder=root / name, devices=RandomDevices(dropout=0.2))
    return root


@pytest.fixture
def page_of():
    """Serves a folder of runs; used as page_of(root, first)."""
    opened = []

    def serve(root, first=None, port=0):
        page = LocalPage(root, first, port)
        page.__enter__()
        opened.append(page)
        return page

    yield serve
    for page in opened:
        page.__exit__()
