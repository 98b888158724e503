"""The code for accelerators, run on a CPU: recorded steps, folded sums, bfloat16."""

import functools
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation.sums import FixedSum, rounded, unit_scale
from atoll.core.random import Key
from atoll.data import Examples
from atoll.errors import ConfigurationError
from atoll.learners import Assignment, TorchLearner
from atoll.learners.torch.stacking import cohort as training
from atoll.learners.torch.stacking.cohort import fold
from atoll.simulation import Sequential, Stacked

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
    )


@functools.cache
def problem(size=120):
    rng = np.random.default_rng(0)
    return rng.standard_normal((size, 1, 8, 8), dtype=np.float32), rng.integers(0, 4, size)


def cohort(learner, sizes=(12, 12, 9, 12)):
    x, y = problem()
    parts, at = [], 0
    for size in sizes:
        parts.append(Examples(x, y, np.arange(at, at + size)))
        at += size
    tasks = [Assignment(1, Key(1).fold(c)) for c in range(len(sizes))]
    model = learner.init(Key(0))
    return learner.train_cohort(model, parts, tasks), model


def test_recorded_steps_are_the_steps_themselves():
    plain = TorchLearner(cnn(), lr=0.1, batch_size=4, epochs=2)
    recording = TorchLearner(plain.module, lr=0.1, batch_size=4, epochs=2)
    recording.__dict__["_settings"] = replace(plain._settings, graphs=True, workspaces={})
    expected, _ = cohort(plain)
    for _ in range(2):  # recorded, and then replayed from the start
        found, _ = cohort(recording)
        np.testing.assert_array_equal(found.params, expected.params)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    assert len(recording._settings.workspaces) == 1
    kept = found.params.clone()
    cohort(recording)
    assert torch.equal(kept, found.params)  # results do not share the recorded step's memory


def test_steps_that_are_not_alike_are_not_recorded():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    learner = TorchLearner(module, batch_size=4)
    learner.__dict__["_settings"] = replace(learner._settings, graphs=True, workspaces={})
    cohort(learner)
    assert not learner._settings.workspaces


@pytest.mark.parametrize("size", [0.1, 1e3])  # the second is beyond the integers of float64
@pytest.mark.parametrize("tile", [1 << 20, 7 * 300])
def test_sums_on_the_device_are_the_exact_sums(monkeypatch, size, tile):
    monkeypatch.setattr(training, "FOLD_TILE", tile)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 1000, generator=rng) * size
    weights = [1.0, 3.0, 50.5, 2.0, 0.25, 7.0, 1e-3]
    one, other = FixedSum(1000), FixedSum(1000)
    for row, weight in zip(rows.numpy(), weights, strict=True):
        one.add(row, rounded(weight))  # as the mean does
    other.add_units(*fold(rows, [unit_scale(weight) for weight in weights]))
    np.testing.assert_array_equal(one.value(), other.value())
    for bad in (float("nan"), float("inf"), 1e9):
        broken = rows.clone()
        broken[3, 5] = bad
        assert fold(broken, [unit_scale(weight) for weight in weights]) is None
    assert fold(rows.double(), [unit_scale(weight) for weight in weights]) is None


def test_a_run_with_folded_sums_is_the_same(monkeypatch):
    x, y = problem(200)
    clients = data.from_arrays(x, y, classes=4).iid(clients=10)
    plan = Federation(
        learner=TorchLearner(cnn(), lr=0.1, batch_size=4),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=3, cohort=6),
    )
    engine = Stacked(block=3, workers=1, threads=1)
    folds, plain = [], TorchLearner.fold

    def counted(self, rows, scales):
        folds.append(plain(self, rows, scales))
        return folds[-1]

    monkeypatch.setattr(TorchLearner, "fold", counted)
    found = plan.simulate(clients, engine=engine)
    assert folds
    assert None not in folds
    monkeypatch.setattr(TorchLearner, "fold", lambda self, rows, scales: None)
    expected = plan.simulate(clients, engine=engine)
    assert found.model["params"].tobytes() == expected.model["params"].tobytes()
    assert found.history == expected.history


class Doubtful(algorithms.FedAvg):
    """One client's weight is not a number."""

    def report(self, local, **vectors):
        update = super().report(local, **vectors)
        weight = np.where(np.asarray(update.weight) == 9, np.nan, update.weight)
        return replace(update, weight=weight if weight.ndim else float(weight))


def test_a_weight_that_is_no_number_is_refused_in_a_stack_too():
    x, y = problem(40)
    clients = data.from_columns(x, y, [0, 10, 19, 29, 40], classes=4)
    schedule = schedules.Synchronous(rounds=1, cohort=4, minimum=2)
    plan = Federation(
        learner=TorchLearner(cnn(), lr=0.1, batch_size=4), algorithm=Doubtful(), schedule=schedule
    )
    runs = [
        plan.simulate(clients, engine=engine)
        for engine in (Stacked(block=4, workers=1, threads=1), Sequential(workers=1))
    ]
    for run in runs:
        assert run.history[0].accepted == 3
        assert "its weight is nan" in run.refusals[0]
    np.testing.assert_allclose(runs[0].model["params"], runs[1].model["params"], atol=1e-6)


class Flat(algorithms.LocalRule):
    """A rule that loses the cohort's axis."""

    def work(self, client, got, mine):
        local, vectors, kept = super().work(client, got, mine)
        delta = vectors["delta"]
        return local, {**vectors, "delta": delta[:1] if delta.ndim == 2 else delta}, kept


def test_a_rule_that_loses_clients_is_said_in_words():
    x, y = problem(40)
    clients = data.from_columns(x, y, [0, 10, 20, 30, 40], classes=4)
    plan = Federation(
        learner=TorchLearner(cnn(), lr=0.1, batch_size=4),
        algorithm=algorithms.FedAvg(local=Flat()),
        schedule=schedules.Synchronous(rounds=1, cohort=4),
    )
    run = plan.simulate(clients, engine=Stacked(block=4, workers=1, threads=1))
    assert any("do not work on a stack" in note for note in run.engine_notes)
    assert any("operators only" in note for note in run.engine_notes)


def test_bfloat16_products_are_close_and_weights_stay_float32():
    exact, model = cohort(TorchLearner(cnn(), lr=0.1, batch_size=4))
    learner = TorchLearner(cnn(), lr=0.1, batch_size=4, precision="bfloat16")
    learner.__dict__["init"] = lambda key: model
    half, _ = cohort(learner)
    assert half.params.dtype == torch.float32
    moved = torch.linalg.vector_norm(exact.params - torch.tensor(model["params"]))
    error = torch.linalg.vector_norm(half.params - exact.params) / moved
    assert 1e-6 < float(error) < 0.05


def test_bfloat16_reaches_wide_layers():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8192), nn.Tanh(), nn.Linear(8192, 4))
    moved = []
    for precision in ("float32", "bfloat16"):
        learner = TorchLearner(module, lr=0.1, batch_size=4, precision=precision, weights="given")
        x, y = problem()
        model = learner.init(Key(0))
        local = learner.train(model, Examples(x, y, np.arange(8)), Assignment(1, Key(1)))
        moved.append(local.params.numpy() - model["params"])
    error = np.linalg.norm(moved[0] - moved[1]) / np.linalg.norm(moved[0])
    assert 0 < error < 0.05


def test_columns_stay_on_a_device_only_while_they_live():
    from atoll.learners.torch.stacking.columns import _resident, on_device

    before = len(_resident)
    column = np.zeros((3, 2), np.float32)
    first = on_device(column, torch.device("meta"))
    assert on_device(column, torch.device("meta")) is first
    del column
    assert len(_resident) == before


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ConfigurationError, match="precision must be float32, tf32 or bfloat16"):
        TorchLearner(cnn(), precision="int8")
    with pytest.raises(ConfigurationError, match="device 'warp' cannot be used here"):
        TorchLearner(cnn(), device="warp")


@CUDA
@pytest.mark.parametrize("sizes", [(12, 12, 12), (12, 9, 4)])
def test_a_gpu_trains_as_a_cpu_does(sizes):
    expected, model = cohort(TorchLearner(cnn(), lr=0.1, batch_size=4), sizes)
    learner = TorchLearner(cnn(), lr=0.1, batch_size=4, device="cuda")
    learner.__dict__["init"] = lambda key: model
    found, _ = cohort(learner, sizes)
    np.testing.assert_allclose(found.params.cpu(), expected.params, rtol=1e-3, atol=1e-5)


@CUDA
def test_a_gpu_run_is_repeatable():
    x, y = problem(200)
    clients = data.from_arrays(x, y, classes=4).iid(clients=10)
    plan = Federation(
        learner=TorchLearner(cnn(), lr=0.1, batch_size=4, device="cuda"),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=3, cohort=6),
    )
    runs = [plan.simulate(clients) for _ in range(2)]
    np.testing.assert_allclose(runs[0].model["params"], runs[1].model["params"], rtol=1e-5)
