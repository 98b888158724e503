"""The torch learner on modules that are not plain: frozen, lazy, masked, writing into inputs."""

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key
from atoll.errors import CheckpointError, ConfigurationError, DataError
from atoll.learners import Assignment

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn.utils import parametrizations

from atoll.learners import TorchLearner


def torch_learner(module, **settings):
    return TorchLearner(module, **{"lr": 0.1, "batch_size": 10, **settings})


def population(n=21, clients=2, classes=2):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n * clients, 4)).astype(np.float32)
    y = np.arange(n * clients) % classes
    return data.from_arrays(x, y, classes=classes).iid(clients=clients, test=0.0)


def trained(learner, clients, rounds=2, **given):
    return Federation(
        learner=learner,
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=rounds),
    ).simulate(clients, **given)


def test_batchnorm_with_one_example_left_over():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    run = trained(torch_learner(module), population(21))
    assert run.history[0].measurements["steps"] == 2  # 10 and 11, not 10, 10 and 1
    assert run.history[0].measurements["seen"] == 21
    with pytest.raises(DataError, match="fewer than 2 training examples"):
        trained(torch_learner(module), population(1))


def test_what_the_seed_cannot_draw_is_refused():
    with pytest.raises(ConfigurationError, match="cannot be drawn from the seed"):
        torch_learner(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2))))


def test_frozen_parameters_are_part_of_a_runs_identity(tmp_path):
    def module(seed):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        module[0].requires_grad_(False)
        return module

    clients = population()
    trained(torch_learner(module(1)), clients, 2, folder=tmp_path / "r")
    trained(torch_learner(module(1)), clients, 3, folder=tmp_path / "r", resume=True)
    with pytest.raises(CheckpointError, match="differ from those given"):
        trained(torch_learner(module(2)), clients, 4, folder=tmp_path / "r", resume=True)


def test_infinite_buffers_stay_what_they_are():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, x):
            return self.linear(x) + torch.nan_to_num(self.mask, neginf=-5.0)

    run = trained(torch_learner(Masked()), population())
    assert run.model["buffers"].tolist() == [0.0, -np.inf]


def test_modules_that_write_into_their_inputs():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    rng = np.random.default_rng(0)
    test_part = (rng.normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2)
    clients = data.from_clients(
        {"a": (rng.normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2)},
        test=0.0,
        test_part=test_part,
    )
    before = clients.test_part.x.copy(), clients.x.copy()
    trained(torch_learner(module), clients)
    np.testing.assert_array_equal(clients.test_part.x, before[0])
    np.testing.assert_array_equal(clients.x, before[1])


def test_misfits_get_a_sentence():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(x), x

    cases = [
        (Two(), {}, 2, "gives tuple, not a tensor"),
        (nn.Linear(4, 1), {"loss": "binary_cross_entropy"}, 5, "is for two classes"),
        (nn.Linear(4, 2), {"loss": lambda o, t: o}, 2, "must be one number, their mean"),
    ]
    for module, settings, classes, message in cases:
        with pytest.raises(DataError, match=message):
            trained(torch_learner(module, **settings), population(classes=classes))
    with pytest.raises(ConfigurationError, match="optimizer must be"):
        torch_learner(nn.Linear(4, 2), optimizer="Adam")
    with pytest.raises(ConfigurationError, match="lazy layers"):
        torch_learner(nn.LazyLinear(2))


def test_models_with_scalar_buffers_unpack():
    learner = torch_learner(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
    model = learner.init(Key(0))
    local = learner.train(model, population().train(0), Assignment(1, Key(1)))
    arrays = learner.layout.unpack({"params": local.params, **local.statistics})
    assert int(arrays["1.num_batches_tracked"]) == local.steps
