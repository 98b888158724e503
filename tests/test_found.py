"""Defects that reviews found, kept out for good."""

import json
import multiprocessing
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tapped import Tapped

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.core.random import Key
from atoll.errors import CheckpointError, ConfigurationError, DataError, RunError
from atoll.learners import Assignment, NumpyLearner, rates
from atoll.rounds.describe import describe
from atoll.simulation import (
    LogNormal,
    RandomDevices,
    Stragglers,
    Trace,
    TracedDevices,
)
from atoll.tracking import Observer, RunFolder, read_run
from atoll.tracking.folder import new_folder
from atoll.tracking.reading import read_status


class Outcomes(Observer):
    def __init__(self):
        self.counts = Counter()

    def round(self, run, end):
        self.counts.update((p.client, p.outcome) for p in end.participants)


def test_stopping_in_the_middle_of_a_round_does_not_show(blobs, federation, tmp_path):
    """The clock of a round that was cut short is forgotten with it."""
    devices = RandomDevices(
        steps_per_second=LogNormal(median=1.0, sigma=1.0), availability=0.9, period=7.0
    )
    federation = replace(federation, schedule=schedules.Synchronous(rounds=8, cohort=4))

    done = []

    def stop(turn):
        done.append(turn)
        if len(done) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.simulate(
            blobs, devices=devices, engine=Tapped(lambda turns: None, stop), folder=tmp_path / "a"
        )
    assert len(read_run(tmp_path / "a").history) == 3
    federation.simulate(blobs, devices=devices, folder=tmp_path / "a", resume=True)
    federation.simulate(blobs, devices=devices, folder=tmp_path / "b")
    for name in ("rounds.jsonl", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_any_error_leaves_a_resumable_run(blobs, federation, tmp_path):
    class Broken(Observer):
        def round(self, run, end):
            if end.record.round == 3:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        federation.simulate(blobs, folder=tmp_path / "a", observers=[Broken()])
    assert read_status(tmp_path / "a") == "interrupted"
    assert (tmp_path / "a" / "checkpoints" / "00000003.safetensors").exists()


def test_equally_fast_clients_are_accepted_equally_often(blobs, federation):
    schedule = schedules.Synchronous(rounds=300, cohort=3, invite=5)
    outcomes = Outcomes()
    replace(federation, schedule=schedule).simulate(blobs, observers=[outcomes])
    accepted = [outcomes.counts[str(i), "accepted"] for i in range(8)]
    # 900 acceptances over 8 clients: five standard deviations around 112.
    assert max(abs(count - 112.5) for count in accepted) < 5 * np.sqrt(112.5)


@pytest.mark.parametrize("seconds", [0.7, 1.0, 3.3])
def test_work_that_fills_the_deadline_is_in_time(blobs, federation, seconds):
    schedule = schedules.Synchronous(rounds=20, deadline=seconds, minimum=1)
    outcomes = Outcomes()
    devices = Stragglers(share=0.0, seconds=seconds)
    learner = NumpyLearner(layers=(2, 3), batch_size=3, epochs=7)
    federation = replace(federation, schedule=schedule, learner=learner)
    federation.simulate(blobs, devices=devices, observers=[outcomes])
    assert {outcome for _, outcome in outcomes.counts} == {"accepted"}


def test_a_drop_out_without_a_deadline_does_not_end_the_run(blobs, federation):
    federation = replace(federation, schedule=schedules.Synchronous(rounds=30, cohort=8))
    run = federation.simulate(blobs, devices=RandomDevices(dropout=0.1))
    assert len(run.history) == 30


def test_rounds_that_cannot_reach_their_minimum_train_nobody(blobs, federation):
    done = []

    traces = {str(i): Trace(((0.0, 9.0),) if i < 3 else ((50.0, 99.0),), 1e3) for i in range(8)}
    schedule = schedules.Synchronous(rounds=1, cohort=5, minimum=5, pause=1.0)
    replace(federation, schedule=schedule).simulate(
        blobs, devices=TracedDevices(traces), engine=Tapped(lambda turns: done.append(len(turns)))
    )
    assert done == [5]


def test_intervals_that_touch_or_overlap_are_one():
    assert Trace(((10.0, 20.0), (0.0, 10.0), (5.0, 7.0))).intervals == ((0.0, 20.0),)
    devices = TracedDevices({"a": Trace(((0.0, 5.0), (20.0, 24.0)))}, period=24.0)
    assert devices.leaves("a", 22.0) == 29.0
    assert devices.leaves("a", 10.0) is None
    for intervals, speed in ((((3.0, 1.0),), 1.0), (((0.0, 1.0),), 0.0)):
        with pytest.raises(DataError):
            Trace(intervals, speed)


def test_diverging_runs_say_so(blobs, federation):
    learner = NumpyLearner(layers=(2, 4, 3), lr=1e30)
    with (
        pytest.raises(RunError, match=r"NaN or infinite .* try a smaller lr"),
        np.errstate(all="ignore"),
    ):
        replace(federation, learner=learner).simulate(blobs)


@pytest.mark.parametrize(
    "algorithm",
    [
        algorithms.FedAvg(server_lr=np.float64(0.7)),
        algorithms.FedAdam(server_lr=np.float64(0.1)),
        algorithms.FedAvgM(momentum=np.float64(0.5)),
        algorithms.FedSGD(lr=np.float64(0.5)),
        algorithms.FedProx(mu=np.float64(0.1)),
    ],
)
def test_numpy_numbers_are_numbers(blobs, federation, algorithm):
    run = replace(federation, algorithm=algorithm).simulate(blobs)
    assert run.model["params"].dtype == np.float32
    assert len(run.history) == 6


def test_scaffold_under_a_decaying_rate(blobs, federation):
    learner = NumpyLearner(layers=(2, 3), lr=rates.Cosine(0.1, rounds=6))
    run = replace(federation, learner=learner, algorithm=algorithms.Scaffold()).simulate(blobs)
    assert len(run.history) == 6
    dead = NumpyLearner(layers=(2, 3), lr=lambda round: 0.0)
    with pytest.raises(ConfigurationError, match="is 0.0 in round 1"):
        replace(federation, learner=dead).simulate(blobs)


def test_clipping_several_vectors_must_be_said(federation):
    federation = replace(federation, algorithm=algorithms.Scaffold())
    with pytest.raises(ConfigurationError, match=r"delta and control; say which"):
        replace(federation, pipeline=Clip(1.0) >> Mean())
    with pytest.raises(ConfigurationError, match="no 'deltas' to clip"):
        replace(federation, pipeline=Clip(1.0, only=("deltas",)) >> Mean())
    replace(federation, pipeline=Clip(1.0, only=("delta", "control")) >> Mean())


def test_clipped_norms_are_never_above_the_bound():
    from atoll.core.updates import Update

    rng = np.random.default_rng(0)
    for _ in range(300):
        update = Update({"delta": rng.normal(0, 9, 50).astype(np.float32)})
        clipped, _ = Clip(1.0).encode(update, {}, {}, Key(0))
        assert np.linalg.norm(clipped.vectors["delta"].astype(np.float64)) <= 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: algorithms.FedProx(mu=-1.0),
        lambda: algorithms.FedProx(mu=float("nan")),
        lambda: algorithms.FedProx(mu="0.1"),
        lambda: algorithms.FedSGD(lr=-1.0),
        lambda: algorithms.FedSGD(lr=1.0, server_lr=2.0),
        lambda: NumpyLearner(layers=(2, 3), lr=float("inf")),
        lambda: RunFolder("x", every=0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


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
        def finish(self, client, local, got, mine):
            update, mine = super().finish(client, local, got, mine)
            return replace(update, metrics={"wild": 1e300, "nan": float("nan"), "fine": 2.0}), mine

    run = replace(federation, algorithm=Wild()).simulate(blobs)
    assert run.history[0].measurements["fine"] == 2.0
    assert "wild" not in run.history[0].measurements


def test_functions_of_one_name_are_told_apart():
    assert describe(lambda a: 5 * a) != describe(lambda a: 6 * a)

    def scaled(by):
        return lambda a: by * a

    assert describe(scaled(2)) == describe(scaled(2)) != describe(scaled(3))


def test_records_are_strict_json(tmp_path):
    x = np.zeros((40, 2), np.float32)
    clients = data.from_arrays(x, np.ones(40, np.float32), task="regression").iid(clients=2)
    federation = Federation(
        learner=NumpyLearner(layers=(2, 1), loss="squared"),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
    )
    run = federation.simulate(clients, folder=tmp_path / "r")
    assert np.isnan(run.history[0].metrics["r2"])
    text = (tmp_path / "r" / "rounds.jsonl").read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert np.isnan(read_run(tmp_path / "r").history[0].metrics["r2"])


def test_fewer_rounds_than_a_run_has_are_refused(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=tmp_path / "r")
    shorter = replace(federation, schedule=schedules.Synchronous(rounds=3, cohort=4))
    with pytest.raises(CheckpointError, match="has 6 rounds already"):
        shorter.simulate(blobs, folder=tmp_path / "r", resume=True)
    assert read_run(tmp_path / "r").rounds == 6


def test_the_checkpoint_before_a_damaged_one_can_be_used(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=RunFolder(tmp_path / "r", every=2))
    whole = (tmp_path / "r" / "model.safetensors").read_bytes()
    latest = tmp_path / "r" / "checkpoints" / "00000006.safetensors"
    latest.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"delete it to go on .*00000004.safetensors"):
        federation.simulate(blobs, folder=tmp_path / "r", resume=True)
    latest.unlink()
    federation.simulate(blobs, folder=RunFolder(tmp_path / "r", every=2), resume=True)
    assert (tmp_path / "r" / "model.safetensors").read_bytes() == whole


def test_a_folder_in_use_is_left_alone(blobs, federation, tmp_path):
    class Intruder(Observer):
        def round(self, run, end):
            with pytest.raises(CheckpointError, match="in use by a run that is still going on"):
                federation.simulate(blobs, folder=tmp_path / "r", resume=True)

    federation.simulate(blobs, folder=tmp_path / "r", observers=[Intruder()])
    federation.simulate(blobs, folder=tmp_path / "r", resume=True)


def claim(root):
    return str(new_folder(root, "run"))


def test_new_folders_are_never_shared(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        names = pool.map(claim, [tmp_path] * 20)
    assert len(set(names)) == 20


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{}"),
        ("config.json", '{"plan": {"algorithm": 3}, "data": {}, "seed": 0, "rounds": 1}'),
        ("spread.json", "["),
        ("timings.jsonl", "{}\n{}\n"),
        ("rounds.jsonl", '{"round": 1}\n'),
    ],
)
def test_damaged_files_of_a_run_get_a_sentence(blobs, federation, tmp_path, name, text):
    federation.simulate(blobs, folder=tmp_path / "r")
    (tmp_path / "r" / name).write_text(text)
    with pytest.raises(CheckpointError):
        read_run(tmp_path / "r")


def test_one_keeper_can_keep_two_runs(blobs, federation, tmp_path):
    federation = replace(federation, algorithm=algorithms.Scaffold())
    keeper = RunFolder(tmp_path / "a")
    federation.simulate(blobs, folder=keeper)
    keeper.path = tmp_path / "b"
    federation.simulate(blobs, folder=keeper)
    longer = replace(federation, schedule=schedules.Synchronous(rounds=8, cohort=4))
    longer.simulate(blobs, folder=tmp_path / "b", resume=True)


def test_minimum_zero_partitions():
    from atoll.data import partition

    parts = partition.dirichlet(np.zeros(9, np.int64), 3, 0.1, 0, np.random.default_rng(0))
    assert sum(map(len, parts)) == 9


class TestTorch:
    """What needs torch."""

    @pytest.fixture(autouse=True)
    def _needs_torch(self):
        pytest.importorskip("torch")

    def learner(self, module, **settings):
        from atoll.learners import TorchLearner

        return TorchLearner(module, **{"lr": 0.1, "batch_size": 10, **settings})

    def population(self, n=21, clients=2, classes=2):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(n * clients, 4)).astype(np.float32)
        y = np.arange(n * clients) % classes
        return data.from_arrays(x, y, classes=classes).iid(clients=clients, test=0.0)

    def run(self, learner, clients, rounds=2, **given):
        return Federation(
            learner=learner,
            algorithm=algorithms.FedAvg(),
            schedule=schedules.Synchronous(rounds=rounds),
        ).simulate(clients, **given)

    def test_batchnorm_with_one_example_left_over(self):
        from torch import nn

        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        run = self.run(self.learner(module), self.population(21))
        assert run.history[0].measurements["steps"] == 2  # 10 and 11, not 10, 10 and 1
        assert run.history[0].measurements["seen"] == 21
        with pytest.raises(DataError, match="fewer than 2 training examples"):
            self.run(self.learner(module), self.population(1))

    def test_what_the_seed_cannot_draw_is_refused(self):
        from torch import nn
        from torch.nn.utils import parametrizations

        learner = self.learner(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2))))
        with pytest.raises(ConfigurationError, match="cannot be drawn from the seed"):
            learner.init(Key(0))

    def test_frozen_parameters_are_part_of_a_runs_identity(self, tmp_path):
        import torch
        from torch import nn

        def module(seed):
            torch.manual_seed(seed)
            module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            module[0].requires_grad_(False)
            return module

        clients = self.population()
        self.run(self.learner(module(1)), clients, 2, folder=tmp_path / "r")
        self.run(self.learner(module(1)), clients, 3, folder=tmp_path / "r", resume=True)
        with pytest.raises(CheckpointError, match="differ from those given"):
            self.run(self.learner(module(2)), clients, 4, folder=tmp_path / "r", resume=True)

    def test_infinite_buffers_stay_what_they_are(self):
        import torch
        from torch import nn

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 2)
                self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

            def forward(self, x):
                return self.linear(x) + torch.nan_to_num(self.mask, neginf=-5.0)

        run = self.run(self.learner(Masked()), self.population())
        assert run.model["buffers"].tolist() == [0.0, -np.inf]

    def test_modules_that_write_into_their_inputs(self):
        from torch import nn

        module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
        rng = np.random.default_rng(0)
        test_part = (rng.normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2)
        clients = data.from_clients(
            {"a": (rng.normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2)},
            test=0.0,
            test_part=test_part,
        )
        before = clients.test_part.x.copy(), clients.x.copy()
        self.run(self.learner(module), clients)
        np.testing.assert_array_equal(clients.test_part.x, before[0])
        np.testing.assert_array_equal(clients.x, before[1])

    def test_misfits_get_a_sentence(self):
        from torch import nn

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 2)

            def forward(self, x):
                return self.linear(x), x

        cases = [
            (Two(), {}, 2, "gives tuple, not a tensor"),
            (nn.Linear(4, 1), {"loss": "binary_cross_entropy"}, 5, "is for two classes"),
            (nn.Linear(4, 2), {"loss": lambda o, t: o}, 2, "does not fit"),
        ]
        for module, settings, classes, message in cases:
            with pytest.raises(DataError, match=message):
                self.run(self.learner(module, **settings), self.population(classes=classes))
        with pytest.raises(ConfigurationError, match="optimizer must be"):
            self.learner(nn.Linear(4, 2), optimizer="Adam")
        with pytest.raises(ConfigurationError, match="lazy layers"):
            self.learner(nn.LazyLinear(2))

    def test_models_with_scalar_buffers_unpack(self):
        from torch import nn

        learner = self.learner(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
        model = learner.init(Key(0))
        local = learner.train(model, self.population().train(0), Assignment(1, Key(1)))
        arrays = learner.layout.unpack({"params": local.params, **local.statistics})
        assert int(arrays["1.num_batches_tracked"]) == local.steps
