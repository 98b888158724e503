"""Buffers and counters: private to a client's work, averaged by the server, nothing else."""

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.core.random import Key
from atoll.data import Examples
from atoll.learners import Assignment

torch = pytest.importorskip("torch")
from torch import nn

from atoll.learners import TorchLearner


def module():
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def learner():
    return TorchLearner(module(), lr=0.1, batch_size=5)


def population(scales=(1.0, 10.0, 100.0), n=20):
    rng = np.random.default_rng(0)
    return data.from_clients(
        {
            f"site {scale:g}": (
                scale * rng.normal(size=(n, 2)).astype(np.float32),
                np.arange(n) % 2,
            )
            for scale in scales
        },
        test=0.0,
        test_part=(np.zeros((2, 2), np.float32), np.array([0, 1])),
    )


def run(algorithm, clients, rounds=3, pipeline=None):
    return Federation(
        learner=learner(),
        algorithm=algorithm,
        schedule=schedules.Synchronous(rounds=rounds),
        pipeline=pipeline or Mean(),
    ).simulate(clients, seed=0)


def test_sections():
    assert learner().layout.sizes == {"params": 12 + 8 + 10, "buffers": 8, "counters": 1}


def test_no_statistics_pass_from_one_client_to_the_next():
    shared, clients = learner(), population()
    model = shared.init(Key(0))
    alone = learner().train(model, clients.train(0), Assignment(1, Key(1)))
    shared.train(model, clients.train(2), Assignment(1, Key(2)))
    after = shared.train(model, clients.train(0), Assignment(1, Key(1)))
    for name in ("buffers", "counters"):
        np.testing.assert_array_equal(after.statistics[name], alone.statistics[name])
    torch.testing.assert_close(after.params, alone.params, rtol=0, atol=0)


def test_private_buffers_do_not_leak_either():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1), persistent=False)

        def forward(self, x):
            self.seen += x.abs().sum().detach()
            return x + 0 * self.seen

    shared = TorchLearner(nn.Sequential(nn.Linear(2, 2), Memory()), lr=0.1)
    model = shared.init(Key(0))
    shared.train(model, population().train(2), Assignment(1, Key(2)))
    shared.train(
        model, Examples(np.ones((1, 2), np.float32), np.zeros(1, int)), Assignment(1, Key(1))
    )
    weight, bias = shared.layout.unpack(model).values()
    assert float(shared._resident.module[1].seen) == pytest.approx(
        np.abs(weight.sum(axis=1) + bias).sum(), rel=1e-5
    )


def test_the_server_averages_statistics_by_weight():
    rng = np.random.default_rng(0)
    arrays = {
        "small": (rng.normal(size=(10, 2)).astype(np.float32), np.arange(10) % 2),
        "large": (rng.normal(5, 3, (30, 2)).astype(np.float32), np.arange(30) % 2),
    }
    clients = data.from_clients(arrays, test=0.0)
    result = run(algorithms.FedAvg(), clients, rounds=1)
    own = learner()
    model = own.init(Key(0).fold("init"))
    locals_ = [
        own.train(model, clients.train(i), Assignment(1, Key(0).fold("work", 1, clients.names[i])))
        for i in (0, 1)
    ]
    expected = (10 * locals_[0].statistics["buffers"] + 30 * locals_[1].statistics["buffers"]) / 40
    np.testing.assert_allclose(result.model["buffers"], expected, rtol=1e-5, atol=1e-6)
    # 2 and 6 batches: the weighted mean of the counter is 5, an integer.
    assert result.model["counters"].dtype == np.int64
    assert result.model["counters"].tolist() == [5]


@pytest.mark.parametrize(
    ("make", "lr"),
    [
        (lambda lr: algorithms.FedAdam(server_lr=lr), 5.0),
        (lambda lr: algorithms.FedYogi(server_lr=lr), 5.0),
        (lambda lr: algorithms.FedAdagrad(server_lr=lr), 5.0),
        (lambda lr: algorithms.FedAvgM(momentum=0.9, server_lr=lr), 3.0),
        (lambda lr: algorithms.Scaffold(server=algorithms.server.SGD(lr)), 2.0),
        (lambda lr: algorithms.FedProx(3.0, server=algorithms.server.SGD(lr)), 0.5),
    ],
    ids=["fedadam", "fedyogi", "fedadagrad", "fedavgm", "scaffold", "fedprox"],
)
def test_server_rules_do_not_touch_statistics(make, lr):
    clients = population()
    plain = run(algorithms.FedAvg(), clients, rounds=1)
    other = run(make(lr), clients, rounds=1)
    # The first layer's inputs do not depend on the rule, so neither do its first statistics; what
    # the server does must not show in them: the running mean and variance of one round are the
    # clients' own means, whatever the server's step size.
    assert np.abs(other.model["params"] - plain.model["params"]).max() > 1e-3
    assert other.model["counters"].tolist() == plain.model["counters"].tolist() == [4]
    unstepped = run(make(1e-6), clients, rounds=1)
    np.testing.assert_array_equal(other.model["buffers"], unstepped.model["buffers"])


def test_clipping_leaves_statistics_alone():
    clients = population()
    clipped = run(algorithms.FedAvg(), clients, 1, Clip(1e-3) >> Mean())
    plain = run(algorithms.FedAvg(), clients, 1)
    np.testing.assert_array_equal(clipped.model["buffers"], plain.model["buffers"])
    assert clipped.history[0].measurements["clipped"] == 1.0


def test_fedsgd_updates_statistics_too():
    result = run(algorithms.FedSGD(lr=0.1), population(), rounds=2)
    assert result.model["counters"].tolist() == [2]
    assert np.abs(result.model["buffers"][:4]).max() > 0
