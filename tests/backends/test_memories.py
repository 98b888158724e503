"""What clients remember: of any dtype and shape, the same on every engine."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.algorithms import FedAvg, LocalRule
from atoll.backends.stacks import together
from atoll.core.random import Key
from atoll.core.vectors import nest
from atoll.errors import RunError
from atoll.learners import NumpyLearner, TorchLearner
from atoll.rounds.task import ClientTask, assignment_for
from atoll.simulation import Devices, Sequential, Simulator, Stacked
from atoll.simulation.asynchronous import AsynchronousSimulator
from atoll.tracking import Run

ENGINES = {
    "one by one": Sequential(workers=1),
    "two threads": Sequential(workers=2),
    "two processes": Sequential(workers=2, processes=True),
    "stacks": Stacked(block=3, workers=1, threads=1),
    "stacks in two threads": Stacked(block=2, workers=2, threads=1),
    "stacks in two processes": Stacked(block=2, workers=2, threads=1, processes=True),
}
ROUNDS = 4


@dataclass(frozen=True)
class Diary(LocalRule):
    """Counts rounds in many ways; written with operators only."""

    def remember(self, got, shared):
        return {
            "times": np.array(0, np.int64),
            "seen": np.zeros(3, np.int64),
            "grid": np.arange(6, dtype=np.float32).reshape(2, 3),
            "number": np.array(1.5, np.float32),
            "small": np.array([[200]], np.uint8),
            "wide": np.array([2.0**-40 + 1], np.float64),
            "big": np.array([2**53 + 1, -5], np.int64),
        }

    def finish(self, client, local, got, mine):
        return {}, {
            "times": mine["times"] + 1,
            "seen": mine["seen"] + 2,
            "grid": 2 * mine["grid"],
            "number": mine["number"] * 3,
            "small": mine["small"] + 1,
            "wide": mine["wide"] * 1,
            "big": mine["big"] + 1,
        }


def kept_after(times):
    """By hand."""
    return {
        "times": np.array(times, np.int64),
        "seen": np.full(3, 2 * times, np.int64),
        "grid": (2**times * np.arange(6)).reshape(2, 3).astype(np.float32),
        "number": np.array(1.5 * 3**times, np.float32),
        "small": np.array([[200 + times]], np.uint8),
        "wide": np.array([2.0**-40 + 1], np.float64),
        "big": np.array([2**53 + 1 + times, -5 + times], np.int64),
    }


@pytest.fixture(scope="module")
def clients():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70, 4)).astype(np.float32)
    return data.from_arrays(x, rng.integers(0, 3, 70), classes=3).iid(clients=7)


def federation(rule, schedule=None, **given):
    return Federation(
        learner=given.pop("learner", TorchLearner(nn.Linear(4, 3), lr=0.1, batch_size=5)),
        algorithm=FedAvg(local=rule),
        schedule=schedule or schedules.Synchronous(rounds=ROUNDS, cohort=5),
        **given,
    )


def simulated(plan, clients, engine):
    """A run, the memories of its members, and how often each took part."""
    kind = Simulator if plan.schedule.lockstep else AsynchronousSimulator
    simulator = kind(
        plan, clients, Run(plan.describe(), {}, 0, plan.schedule.rounds),
        devices=Devices(), engine=engine, observers=[],
    )  # fmt: skip
    simulator.go()
    return simulator, {member: nest(flat) for member, (_, flat) in simulator.states.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_memories_keep_their_dtype_and_shape(clients, engine):
    simulator, states = simulated(federation(Diary()), clients, ENGINES[engine])
    if engine.startswith("stacks"):
        assert "stacked" in simulator.run.engine, simulator.run.engine_notes
    times = {member: int(state["algorithm"]["times"]) for member, state in states.items()}
    assert sum(times.values()) == ROUNDS * 5 and max(times.values()) > 1
    for member, state in states.items():
        assert set(state) == {"algorithm"}
        for name, expected in kept_after(times[member]).items():
            found = state["algorithm"][name]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_memories_of_a_learner_of_numpy_too(clients):
    plan = federation(Diary(), learner=NumpyLearner(layers=(4, 3), lr=0.1))
    _, states = simulated(plan, clients, Sequential(workers=1))
    for state in states.values():
        for name, expected in kept_after(int(state["algorithm"]["times"])).items():
            found = state["algorithm"][name]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("engine", ["one by one", "stacks", "two processes"])
def test_memories_under_an_asynchronous_schedule(clients, engine):
    plan = federation(Diary(), schedules.Buffered(rounds=6, concurrency=4, buffer=3))
    _, states = simulated(plan, clients, ENGINES[engine])
    times = [int(state["algorithm"]["times"]) for state in states.values()]
    assert sum(times) == 18
    for state, count in zip(states.values(), times, strict=True):
        np.testing.assert_array_equal(state["algorithm"]["grid"], kept_after(count)["grid"])


def test_memories_outlive_a_checkpoint(clients, tmp_path):
    """0-d arrays and matrices come back from a folder as they went."""
    plan = federation(Diary())
    half = federation(Diary(), schedules.Synchronous(rounds=2, cohort=5))
    half.simulate(clients, engine="sequential", folder=tmp_path / "run")
    rest = plan.simulate(clients, folder=tmp_path / "run", resume=True)
    whole = plan.simulate(clients, engine="sequential", folder=tmp_path / "whole")
    assert rest.model["params"].tobytes() == whole.model["params"].tobytes()
    for path in sorted((tmp_path / "whole" / "clients").iterdir()):
        assert (tmp_path / "run" / "clients" / path.name).read_bytes() == path.read_bytes()


def test_clients_of_a_stack_that_remember_other_names_end_the_run(clients):
    """As after an upgrade of a rule, half of whose clients still have the old memory."""
    plan = federation(Diary())
    received = {"algorithm": {"params": plan.learner.init(Key(0))["params"]}}
    states = [{"algorithm": kept_after(0)}, {"algorithm": {"old": np.zeros(3, np.float32)}}]
    tasks = [
        ClientTask(member, clients.names[member], assignment_for(Key(0), f"{member}", 1, 1, 1.0),
                   state, 1)
        for member, state in enumerate(states)
    ]  # fmt: skip
    sums = plan.stages.open()
    with pytest.raises(RunError, match="one client remembers old and another big, grid, number"):
        together(plan, clients, received, tasks, sums)
    for one in ([tasks[1]], [tasks[1], tasks[1]]):
        with pytest.raises((RunError, KeyError)):
            together(plan, clients, received, one, sums)


@dataclass(frozen=True)
class Normed(LocalRule):
    """Remembers the norm of everything, a number: right for one client, wrong for a stack."""

    def remember(self, got, shared):
        return {"norm": np.array(0.0, np.float32)}

    def finish(self, client, local, got, mine):
        change = local.params - got["params"]
        return {"delta": change / (1 + (mine["norm"] ** 2).sum())}, {
            "norm": mine["norm"] + (change * change).sum(-1)
        }


def test_a_rule_that_mixes_clients_numbers_is_found_out(clients):
    """A memory that is a number is disturbed too, when stacks are tried out."""
    run = federation(Normed()).simulate(clients, engine=ENGINES["stacks"])
    alone = federation(Normed()).simulate(clients, engine=ENGINES["one by one"])
    assert any("stack" in note for note in run.engine_notes)
    assert run.model["params"].tobytes() == alone.model["params"].tobytes()


def test_scaffold_remembers_the_same_on_every_engine(clients):
    plan = Federation(
        learner=TorchLearner(nn.Linear(4, 3), lr=0.1, batch_size=5),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=ROUNDS, cohort=5),
    )
    found = {name: simulated(plan, clients, engine)[1] for name, engine in ENGINES.items()}
    expected = found["one by one"]
    for name, states in found.items():
        assert states.keys() == expected.keys()
        for member, state in states.items():
            np.testing.assert_allclose(
                state["algorithm"]["control"], expected[member]["algorithm"]["control"],
                rtol=1e-3, atol=1e-5, err_msg=name,
            )  # fmt: skip
