"""What an algorithm declares is what it gives: else the run ends at once, with a sentence."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Spec
from atoll.algorithms import FedAvg, LocalRule, server
from atoll.algorithms.local import Plain
from atoll.core.updates import Update
from atoll.errors import AtollError, ConfigurationError, RunError
from atoll.learners import NumpyLearner, TorchLearner
from atoll.simulation import Devices, Sequential, Simulator, Stacked
from atoll.tracking import Run

ENGINES = [
    Sequential(workers=1),
    Sequential(workers=2, processes=True),
    Stacked(block=3, workers=1, threads=1),
    Stacked(block=3, workers=2, threads=1, processes=True),
]


@pytest.fixture(scope="module")
def clients():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    return data.from_arrays(x, rng.integers(0, 3, 60), classes=3).iid(clients=6)


def federation(algorithm, learner=None, rounds=3):
    return Federation(
        learner=learner or TorchLearner(nn.Linear(4, 3), lr=0.1, batch_size=5),
        algorithm=algorithm,
        schedule=schedules.Synchronous(rounds=rounds),
    )


def change(local, got):
    return local.params - got["params"]


class Undeclared(LocalRule):
    def finish(self, client, local, got, mine):
        return {"extra": change(local, got)}, mine


class Missing(LocalRule):
    def reports(self, shared):
        return {"extra": shared.size}


class WrongShape(LocalRule):
    def reports(self, shared):
        return {"extra": shared.size + 1}

    def finish(self, client, local, got, mine):
        return {"extra": change(local, got)}, mine


class Forgetful(LocalRule):
    def remember(self, got, shared):
        return {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}

    def finish(self, client, local, got, mine):
        return {}, {"a": mine["a"]}


class Inventive(LocalRule):
    def finish(self, client, local, got, mine):
        return {}, {"a": change(local, got)}


class Growing(LocalRule):
    def remember(self, got, shared):
        return {"a": np.zeros(shared.size - 1, np.float32)}

    def finish(self, client, local, got, mine):
        return {}, {"a": change(local, got)}


class Halves(LocalRule):
    """Declares whole numbers, and remembers halves."""

    def remember(self, got, shared):
        return {"a": np.zeros(2, np.int64)}

    def finish(self, client, local, got, mine):
        return {}, {"a": mine["a"] + 0.5}


class Measured(FedAvg):
    def report(self, local, **vectors):
        update = super().report(local, **vectors)
        return replace(update, metrics={**update.metrics, "mine": local.steps})


class Shared(FedAvg):
    def report(self, local, **vectors):
        return replace(super().report(local, **vectors), shares={"delta": 0.5})


class Nameless(FedAvg):
    def report(self, local, **vectors):
        return Update({"theta": vectors["delta"]})


WRONG = {
    "a vector more": (FedAvg(local=Undeclared()), "reports delta, extra, but it declared delta"),
    "a vector less": (FedAvg(local=Missing()), "reports delta, but it declared delta, extra"),
    "a vector of another shape": (FedAvg(local=WrongShape()), "update 'extra' has shape"),
    "a vector of another name": (Nameless(), "reports theta, but it declared delta"),
    "a memory less": (FedAvg(local=Forgetful()), "remembers a, but declared a, b"),
    "a memory more": (FedAvg(local=Inventive()), "remembers a, but declared none"),
    "a memory of another shape": (FedAvg(local=Growing()), "memory 'a' has shape"),
    "a memory of another kind": (FedAvg(local=Halves()), "declared int64, and is not whole"),
    "a metric more": (Measured(), "reports a metric 'mine' that is not among its `metrics`"),
    "a share": (Shared(), "gives 'delta' a share, but did not declare it optional"),
}


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("what", WRONG)
def test_what_was_not_declared_ends_the_run(clients, what, engine):
    algorithm, sentence = WRONG[what]
    with pytest.raises(RunError, match=sentence):
        federation(algorithm).simulate(clients, engine=engine)


@pytest.mark.parametrize("what", WRONG)
def test_it_ends_at_the_first_task(clients, what):
    """Not after ten attempts at a round, of six clients each."""
    worked = []

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Watched(NumpyLearner):
        def train(self, *given):
            worked.append(1)
            return super().train(*given)

    plan = federation(WRONG[what][0], Watched(layers=(4, 3)))
    run = plan.rounds(clients, engine=Sequential(workers=1))
    with pytest.raises(RunError):
        run.go()
    assert len(worked) == 1
    assert run.run.history == []


@dataclass(frozen=True)
class Keeping(LocalRule):
    """Keeps something at the server."""

    name: str = "mine"

    def init(self, params):
        return {self.name: np.zeros_like(params)}

    def step(self, state, mean):
        return {self.name: state[self.name] + 1}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("first", server.Adam()), ("second", server.Adam()), ("velocity", server.Momentum())],
)
def test_a_rule_and_a_server_may_keep_the_same_name(clients, name, optimizer):
    """Each has its own: the optimiser takes its own steps, and the rule counts its own rounds."""
    plan = federation(FedAvg(local=Keeping(name), server=optimizer))
    simulator = Simulator(
        plan, clients, Run(plan.describe(), {}, 0, 3),
        devices=Devices(), engine=ENGINES[0], observers=[],
    )  # fmt: skip
    found = simulator.go().model["params"]
    plain = federation(FedAvg(server=optimizer)).simulate(clients, engine=ENGINES[0])
    assert found.tobytes() == plain.model["params"].tobytes()
    assert set(simulator.driver.server.state[f"local.{name}"]) == {3}


def test_a_rule_cannot_keep_the_models_own_name(clients):
    with pytest.raises(ConfigurationError, match="params"):
        federation(FedAvg(local=Keeping("params"))).rounds(clients)


def test_names_at_the_server_can_be_kept(clients):
    with pytest.raises(ConfigurationError, match="without '/'"):
        federation(FedAvg(local=Keeping("a/b"))).rounds(clients)


@dataclass(frozen=True)
class Reporting(LocalRule):
    reported: tuple

    def reports(self, shared):
        return dict(self.reported)


@pytest.mark.parametrize(
    "reported",
    [
        (("a b", 3),),
        (("a/b", 3),),
        (("", 3),),
        (("x" * 65, 3),),
        ((3, 3),),
        (("x", Spec((3,))), ("\u00e9", 3)),
        # The change is the algorithm's own; a rule cannot declare another one.
        (("delta", 3),),
    ],
    ids=repr,
)
def test_names_that_cannot_travel_are_refused_when_they_are_declared(reported):
    with pytest.raises(ConfigurationError):
        federation(FedAvg(local=Reporting(reported)))


class Losing(Keeping):
    def step(self, state, mean):
        return {}


class Making(Plain):
    def step(self, state, mean):
        return {"more": state["params"]}


@pytest.mark.parametrize("rule", [Losing(), Making()])
def test_a_step_that_changes_what_is_kept_ends_the_run(clients, rule):
    with pytest.raises(RunError, match="must give every vector of its state"):
        federation(FedAvg(local=rule)).simulate(clients)


class Scaled(LocalRule):
    """Keeps a figure of the first parameters."""

    def init(self, params):
        return {"largest": np.array([np.abs(params).max()], np.float32)}

    def step(self, state, mean):
        return {"largest": state["largest"]}


class Largest(server.SGD):
    def init(self, params):
        return {"first": params[:1].copy(), "largest": np.array([np.abs(params).max()])}

    def step(self, params, delta, memory):
        return params + delta, memory


@pytest.mark.parametrize(
    "algorithm", [FedAvg(local=Scaled()), FedAvg(server=Largest())], ids=["rule", "server"]
)
def test_what_is_kept_may_be_computed_from_the_first_parameters(clients, algorithm):
    plan = federation(algorithm)
    expected = federation(FedAvg()).simulate(clients, engine=ENGINES[0]).model["params"]
    assert plan.simulate(clients, engine=ENGINES[0]).model["params"].tobytes() == expected.tobytes()


class Chatty(FedAvg):
    """Makes a mistake of its own between two questions."""

    def talk(self, state, talk):
        yield algorithms.Gather({})
        raise KeyError("my own mistake")


def test_a_mistake_in_a_conversation_ends_the_run_at_once(clients):
    rounds = federation(Chatty()).rounds(clients, engine=ENGINES[0])
    with pytest.raises((AtollError, KeyError), match="my own mistake") as caught:
        rounds.go()
    assert "Mean" not in str(caught.value), "the mean is not to blame"
    assert rounds.run.refusals == []
