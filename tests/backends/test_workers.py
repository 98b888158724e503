"""Workers: however many, wherever they are, and whenever they die, the bytes are the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.algorithms import FedAvg, LocalRule
from atoll.algorithms.scaffold import ControlVariates
from atoll.backends.allocator import keep_freed_memory
from atoll.backends.dispatch import LOSSES
from atoll.backends.parsing import engine_of
from atoll.errors import CheckpointError, ConfigurationError, RunError
from atoll.learners import Affine, NumpyLearner, TorchLearner
from atoll.rounds.client_states import ClientStates
from atoll.simulation import LocalEngine, Sequential, Stacked
from atoll.tracking import Observer
from atoll.tracking.reading import read_engine


@pytest.fixture(scope="module")
def clients():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400)
    x = (rng.normal(size=(400, 6)) + y[:, None]).astype(np.float32)
    return data.from_arrays(x, y, classes=3).lognormal(clients=20, sigma=0.8, seed=0)


def federation(**changes):
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    plain = Federation(
        learner=TorchLearner(module, lr=0.1, batch_size=5, epochs=2),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=3, cohort=11),
    )
    return replace(plain, **changes)


def model(plan, clients, engine, **given):
    return plan.simulate(clients, seed=3, engine=engine, **given).model["params"].tobytes()


ENGINES = [
    Stacked(block=3, workers=1, threads=1),
    Stacked(block=3, workers=4, threads=1),
    Stacked(block=3, workers=1, threads=1, processes=True),
    Stacked(block=3, workers=4, threads=1, processes=True),
    "stacked(block=3, processes=2, threads=1)",
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": algorithms.FedProx(mu=0.1), "pipeline": Clip(0.5) >> Mean()},
        {"algorithm": algorithms.FedSGD(lr=0.3)},
        {"algorithm": algorithms.Scaffold(option="I")},
    ],
)
def test_the_number_and_kind_of_workers_change_no_byte(clients, changes):
    plan = federation(**changes)
    assert len({model(plan, clients, engine) for engine in ENGINES}) == 1
    singles = [Sequential(workers=1), Sequential(workers=4), Sequential(workers=3, processes=True)]
    assert len({model(plan, clients, engine) for engine in singles}) == 1


def test_methods_agree_with_each_other(clients):
    plan = federation()
    a, b = (
        plan.simulate(clients, seed=3, engine=engine)
        for engine in (ENGINES[0], Sequential(workers=1))
    )
    np.testing.assert_allclose(a.model["params"], b.model["params"], rtol=1e-4, atol=1e-6)
    for mine, other in zip(a.history, b.history, strict=True):
        assert mine.bytes_down == other.bytes_down
        assert abs(mine.bytes_up - other.bytes_up) < 200  # metrics are written as text
        assert mine.measurements == pytest.approx(other.measurements, rel=1e-4)


def test_batch_norm_travels_through_every_kind_of_worker(clients):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    clients = clients.subset([c for c in range(len(clients)) if clients.size(c) > 1])
    plan = federation(learner=TorchLearner(module, lr=0.1, batch_size=5))
    runs = [plan.simulate(clients, seed=1, engine=engine) for engine in ENGINES[1:4]]
    for section in ("params", "buffers", "counters"):
        assert len({run.model[section].tobytes() for run in runs}) == 1


class Assassin(Observer):
    """Kills one of this process's children whenever it has seen one for a moment."""

    def __init__(self, kills):
        # What else this process has started is none of our business.
        self.left, self.killed = kills, [int(pid) for pid in children()]
        self.spared = len(self.killed)
        self._stop = threading.Event()

    def begin(self, run):
        self._thread = threading.Thread(target=self._hunt)
        self._thread.start()

    def _hunt(self):
        while self.left and not self._stop.is_set():
            time.sleep(0.03)
            fresh = [int(pid) for pid in children() if int(pid) not in self.killed]
            if fresh:
                os.kill(fresh[0], signal.SIGKILL)
                self.killed.append(fresh[0])
                self.left -= 1

    def close(self):
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True, eq=False, kw_only=True)
class Slow(TorchLearner):
    """Takes its time, so that a worker can be met in the middle of a round."""

    def train_cohort(self, *given):
        time.sleep(0.02)
        return super().train_cohort(*given)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_workers_killed_in_the_middle_of_rounds_change_no_byte(clients):
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    plan = federation(
        learner=Slow(module=module, lr=0.1, batch_size=5, epochs=2),
        schedule=schedules.Synchronous(rounds=6, cohort=17),
    )
    quiet = model(plan, clients, Stacked(block=2, workers=2, processes=True))
    assassin = Assassin(8)
    noisy = model(plan, clients, Stacked(block=2, workers=2, processes=True), observers=[assassin])
    assert len(assassin.killed) - assassin.spared == 8
    assert noisy == quiet


@dataclass(frozen=True, eq=False, kw_only=True)
class Deadly(TorchLearner):
    def train(self, *given, **named):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_kills_every_worker_ends_the_run_with_a_sentence(clients):
    before = children()
    plan = federation(learner=Deadly(module=nn.Linear(6, 3)), algorithm=FedAvg())
    with pytest.raises(RunError, match=f"{LOSSES + 1} workers were lost.*killed by signal 9"):
        plan.simulate(clients, engine=Sequential(workers=2, processes=True))
    assert children() == before


def children():
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return path.read_text().split() if path.exists() else []


class Stern(LocalRule):
    def finish(self, client, local, got, mine):
        raise RunError("not today")


def test_an_error_in_a_worker_is_the_runs_error(clients):
    before = children()
    plan = federation(algorithm=FedAvg(local=Stern()))
    for engine in (Sequential(workers=2), Sequential(workers=2, processes=True)):
        with pytest.raises(RunError, match="not today"):
            plan.simulate(clients, engine=engine)
    assert children() == before


class Normed(LocalRule):
    """Divides by a norm over everything: right for one client, wrong for a stack."""

    def finish(self, client, local, got, mine):
        delta = local.params - got["params"]
        return {"delta": delta / (1 + (delta * delta).sum())}, mine


class Deciding(LocalRule):
    def finish(self, client, local, got, mine):
        weight = 2.0 if local.loss > 0.1 else 1.0
        return {"delta": weight * (local.params - got["params"])}, mine


class Counting(FedAvg):
    """Weighs by the length of what holds the examples, which is not a count in a cohort."""

    def work(self, client, got, mine):
        update, memory = super().work(client, got, mine)
        return replace(update, weight=len(client.examples)), memory


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        (FedAvg(local=Normed()), "something else for a stack"),
        (FedAvg(local=Deciding()), "do not work on a stack"),
        (Counting(), "stack of clients"),
    ],
)
@pytest.mark.parametrize("processes", [False, True])
def test_algorithms_that_cannot_be_stacked_are_found_out(clients, algorithm, why, processes):
    plan = federation(algorithm=algorithm)
    run = plan.simulate(clients, engine=Stacked(block=4, workers=1, processes=processes), seed=3)
    assert any(why in note for note in run.engine_notes)
    assert run.engine.startswith("sequential(")
    assert run.model["params"].tobytes() == model(plan, clients, Sequential(workers=1))


def test_learners_without_stacks_step_aside(clients):
    plan = federation(learner=NumpyLearner(layers=(6, 3)))
    run = plan.simulate(clients, engine="stacked", seed=3)
    assert run.engine == "sequential(workers=1, threads=1)"
    assert "NumpyLearner trains one client at a time" in run.engine_notes[0]
    assert run.model["params"].tobytes() == model(plan, clients, None)
    threads = plan.simulate(clients, engine=Sequential(workers=4), seed=3)
    assert threads.engine == "sequential(workers=1, threads=1)"


def test_diverging_clients_are_refused_and_the_others_counted(clients):
    class Poisoned(LocalRule):
        def finish(self, client, local, got, mine):
            broken = np.asarray(local.examples) > 20
            factor = torch.tensor(np.where(broken, np.nan, 1.0), dtype=torch.float32)
            return {"delta": factor * (local.params - got["params"])}, mine

    plan = federation(
        algorithm=FedAvg(local=Poisoned()),
        schedule=schedules.Synchronous(rounds=2, cohort=20, minimum=1),
    )
    runs = [plan.simulate(clients, seed=3, engine=engine) for engine in (*ENGINES[:4],)]
    sizes = clients.sizes()
    for run in runs:
        assert run.history[0].accepted == int((sizes <= 20).sum()) < len(sizes)
        assert "NaN or infinite" in run.refusals[0]
        assert run.history == runs[0].history


def test_auto_measures_records_and_is_reproduced(clients, tmp_path):
    plan = federation()
    run = plan.simulate(clients, seed=3, engine="auto", folder=tmp_path / "run")
    assert any("us for each local step" in note for note in run.engine_notes)
    assert read_engine(tmp_path / "run") == run.engine
    assert isinstance(engine_of(run.engine).resolve(plan, clients), LocalEngine)
    again = plan.simulate(clients, seed=3, engine=run.engine)
    assert again.model["params"].tobytes() == run.model["params"].tobytes()
    assert again.engine == run.engine


def test_a_resumed_run_takes_the_engine_that_began_it(clients, tmp_path):
    plan = federation(schedule=schedules.Synchronous(rounds=6, cohort=11))
    engine = "stacked(block=4, workers=1, threads=1)"

    class Stop(Observer):
        def round(self, run, end):
            if end.record.round == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.simulate(clients, engine=engine, folder=tmp_path / "run", observers=[Stop()])
    resumed = plan.simulate(clients, engine="auto", folder=tmp_path / "run", resume=True)
    assert resumed.engine == engine
    whole = plan.simulate(clients, engine=engine)
    assert resumed.model["params"].tobytes() == whole.model["params"].tobytes()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fast", "use 'auto', 'sequential', 'stacked'"),
        ("stacked(block=x)", "says nothing about the engine 'stacked'"),
        ("stacked(colour=3)", "says nothing about the engine 'stacked'"),
        ("stacked(block=0)", "block must be a whole number of at least 1"),
        (7, "engine 7 is not known"),
    ],
)
def test_engines_that_do_not_exist_are_refused(clients, text, match):
    with pytest.raises(ConfigurationError, match=match):
        federation().simulate(clients, engine=text)


def test_explain_says_what_will_happen(clients):
    plan = federation()
    text = str(plan.explain(clients, engine="stacked(block=5, workers=2, threads=1)"))
    assert "stacked(block=5, workers=2, threads=1)" in text
    assert "workers  2" in text and "Dropout" in text and "batched product" in text
    found = plan.explain(clients)
    assert [kind for _, kind, _ in found.rows] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert "measuring" in str(plan.explain(clients, engine="auto"))
    aside = plan.explain(clients, engine="sequential")
    assert aside.engine.startswith("sequential")
    mine = federation(learner=NumpyLearner(layers=(6, 3))).explain(clients, engine="stacked")
    assert "trains one client at a time" in str(mine)


def test_memories_beyond_the_limit_lie_on_disk():
    memories = ClientStates(limit=4 * 80)
    arrays = {m: {"control": np.full(20, m, np.float32)} for m in range(10)}
    for member, vectors in arrays.items():
        memories[member] = (member, vectors)
    assert len(memories) == 10 and sorted(memories) == list(range(10))
    assert memories.rounds() == {member: member for member in range(10)}
    for member in range(10):
        round, vectors = memories[member]
        assert round == member
        np.testing.assert_array_equal(vectors["control"], arrays[member]["control"])
    memories[3] = (7, {"control": np.zeros(20, np.float32)})
    assert memories[3][0] == 7 and len(memories) == 10
    del memories[0], memories[9]
    assert 0 not in memories and 9 not in memories and len(memories) == 8


def test_a_run_with_memories_on_disk_is_the_same(clients, monkeypatch, tmp_path):
    plan = federation()
    expected = model(plan, clients, None, folder=tmp_path / "a")
    monkeypatch.setattr(ClientStates.__init__, "__defaults__", (300,))
    assert model(plan, clients, None, folder=tmp_path / "b") == expected
    for name in sorted(p.name for p in (tmp_path / "a" / "clients").iterdir()):
        a, b = (tmp_path / side / "clients" / name for side in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_the_allocator_can_be_told_anywhere():
    keep_freed_memory()


class Words(nn.Module):
    """Layers that run through torch's own modules, of which every thread needs its own."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 6)
        self.body = nn.LSTM(6, 6, batch_first=True)
        self.slope, self.head = nn.PReLU(), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.slope(self.body(self.words(x))[0]))


def test_threads_do_not_share_the_layers_that_hold_weights():
    text = np.random.default_rng(0).integers(0, 5, (400, 13))
    clients = data.from_columns(
        text[:, :-1].copy(), text[:, 1:].copy(), np.arange(0, 401, 40), task="tokens", classes=5
    )
    plan = federation(
        learner=TorchLearner(Words(), lr=0.5, batch_size=10, epochs=3), algorithm=FedAvg(),
        schedule=schedules.Synchronous(rounds=3),
    )  # fmt: skip
    engines = [Sequential(workers=1), Sequential(workers=4), Sequential(workers=4),
               Sequential(workers=2, processes=True)]  # fmt: skip
    assert len({model(plan, clients, engine) for engine in engines}) == 1


class Remembering(ControlVariates):
    """A norm over all clients' control variates, which are zero at first."""

    def correction(self, got, mine):
        difference = got["control"] - mine["control"]
        return Affine(constant=difference / (1 + (difference * difference).sum() ** 0.5))


def test_rules_that_differ_only_once_clients_remember_are_found_out(clients):
    plan = federation(algorithm=FedAvg(local=Remembering(), weighting="uniform"))
    run = plan.simulate(clients, engine=Stacked(block=4, workers=1), seed=3)
    assert any("something else for a stack" in note for note in run.engine_notes)


def test_processes_have_one_thread_each(clients):
    run = federation().simulate(clients, engine="stacked(block=3, processes=2, threads=2)", seed=3)
    assert run.engine == "stacked(block=3, processes=2, threads=1)"
    assert any("do not survive a fork" in note for note in run.engine_notes)


class Mistaken(LocalRule):
    def finish(self, client, local, got, mine):
        return got["no such vector"]


def test_a_mistake_in_a_worker_is_told_once(clients, capfd):
    with pytest.raises(RunError, match="a worker failed: KeyError: 'no such vector'"):
        federation(algorithm=FedAvg(local=Mistaken())).simulate(
            clients, engine=Sequential(workers=1, processes=True)
        )
    assert capfd.readouterr().err.count("Traceback") == 1


ORPHANS = """
import os, sys, time
import numpy as np
from atoll import Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.simulation import Sequential

class Slow(NumpyLearner):
    def train(self, *given, **named):
        time.sleep(60)

rng = np.random.default_rng(0)
clients = data.from_arrays(
    rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 2, 60), classes=2
).iid(clients=6)
print("ready", flush=True)
Federation(
    learner=Slow(layers=(4, 2)), algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=1),
).simulate(clients, engine=Sequential(workers=2, processes=True))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_workers_die_with_their_parent():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline() == b"ready\n"
        path = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while len(path.read_text().split()) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        workers = path.read_text().split()
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < deadline, "workers have outlived their parent"
        time.sleep(0.05)


def test_a_run_stopped_in_an_evaluation_keeps_whole_rounds(clients, tmp_path, monkeypatch):
    from atoll.simulation import simulator

    plan = federation(schedule=schedules.Synchronous(rounds=5, cohort=11))
    engine = "stacked(block=4, workers=1, threads=1)"
    whole = model(plan, clients, engine)
    plain, calls = simulator.evaluate_pooled, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(simulator, "evaluate_pooled", stopping)
    with pytest.raises(KeyboardInterrupt):
        plan.simulate(clients, seed=3, engine=engine, folder=tmp_path / "run")
    assert model(plan, clients, None, folder=tmp_path / "run", resume=True) == whole


def test_a_memory_that_cannot_be_written_is_not_lost(monkeypatch):
    memories = ClientStates(limit=100)
    memories[1] = (1, {"control": np.zeros(20, np.float32)})
    monkeypatch.setattr(ClientStates, "_path", lambda self, member: Path("/proc/none/such"))
    with pytest.raises(CheckpointError, match="does not fit in memory"):
        memories[2] = (1, {"control": np.ones(20, np.float32)})
    assert sorted(memories) == [1, 2] and memories[1][1]["control"].sum() == 0
