"""A stack refuses, keeps and leaves alone what a site by itself would."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Ask, Gathered, Mean, Reducer, Schema
from atoll.core.updates import Update
from atoll.learners import TorchLearner
from atoll.simulation import Attackers, Boost, Sequential, SignFlip, Stacked

ENGINES = Sequential(), Stacked(block=2), Stacked(block=5)


def digits(clients=10):
    return data.load("digits").dirichlet(clients=clients, alpha=0.5, seed=0)


def linear(algorithm, **more):
    torch.manual_seed(0)
    learner = TorchLearner(torch.nn.Sequential(torch.nn.Linear(64, 10)), lr=0.1, batch_size=10)
    schedule = schedules.Synchronous(rounds=1, minimum=1)
    return Federation(learner=learner, algorithm=algorithm, schedule=schedule, **more)


@dataclass(frozen=True)
class Scored(algorithms.Algorithm):
    """Reports a metric that some clients have out of its range."""

    metrics: ClassVar = {"score": (0.0, 1.0)}

    def init(self, start):
        return {"params": start.params}

    def work(self, client, got, mine):
        local = client.train(got["params"])
        delta = local.params - got["params"]
        score = client.count / 100
        return Update({"delta": delta}, weight=local.examples, metrics={"score": score}), mine

    def step(self, state, mean, server):
        return {"params": state["params"] + mean["delta"]}


def test_metrics_out_of_their_range_are_refused_in_stacks_too():
    clients = digits()
    small = sum(len(clients.train(c)) <= 100 for c in range(len(clients)))
    assert 0 < small < len(clients)
    for engine in ENGINES:
        run = linear(Scored()).simulate(clients, engine=engine)
        assert run.history[0].accepted == small, engine
        assert len(run.refusals) == len(clients) - small and "'score' is" in run.refusals[0]


@dataclass(frozen=True)
class Salted(Reducer):
    """Asks for a salt before the work, and for the same one after it."""

    def open(self, schema):
        return Mean().open(schema)

    def talk(self, schema, talk):
        yield Ask("salt", Gathered(), Schema.of({"hash": 1}))
        heard = yield Ask("update", self.open(schema), schema, works=True)
        aggregate = heard.into.close(talk.population, talk.state, talk.key)
        again = yield Ask("reveal", Gathered(), Schema.of({"salt": 1}))
        found = [float(again.into[sender]["salt"][0]) for sender in again.senders]
        return replace(aggregate, measurements={"least": min(found), "most": max(found)})

    def answer(self, name, told, mail, kept, key):
        if name == "salt":
            return Update({"hash": np.ones(1, np.float32)}), {"salt": np.full(1, 7, np.float32)}
        return Update({"salt": kept.get("salt", np.full(1, -1, np.float32))}), kept


def test_what_was_kept_of_an_earlier_question_outlives_the_work():
    for engine in ENGINES:
        run = linear(algorithms.FedAvg(), pipeline=Salted()).simulate(digits(6), engine=engine)
        found = run.history[0].measurements
        assert (found["least"], found["most"]) == (7, 7), engine


@dataclass(frozen=True)
class Normed(algorithms.LocalRule):
    """A norm over everything, which is wrong on stacks of more than one."""

    def work(self, client, got, mine):
        local = client.train(got["params"])
        delta = local.params - got["params"]
        return local, {"delta": delta / (delta * delta).sum() ** 0.5}, mine


def test_a_first_round_of_one_client_proves_nothing_of_stacks():
    few = schedules.Synchronous(rounds=4, cohort=2, selection=schedules.Poisson())
    plan = replace(linear(algorithms.FedAvg(local=Normed())), schedule=few)
    clients = data.load("digits").dirichlet(clients=10, alpha=5.0, seed=0)
    one, many = (plan.simulate(clients, seed=7, engine=e) for e in (Sequential(), Stacked(block=5)))
    assert many.history[0].invited == 1 and max(r.invited for r in many.history) > 1
    assert "instead of a stack" in many.engine_notes[0]
    np.testing.assert_array_equal(one.model["params"], many.model["params"])


@dataclass(frozen=True)
class Table(algorithms.Algorithm):
    """Reports a matrix of ones."""

    weighted = False

    def reports(self, shared):
        return {"delta": shared.size, "table": (2, 4)}

    def init(self, start):
        return {"params": start.params, "table": np.zeros((2, 4), np.float32)}

    def work(self, client, got, mine):
        local = client.train(got["params"])
        table = client.each(lambda holder: np.ones((2, 4)))
        return Update({"delta": local.params - got["params"], "table": table}), mine

    def step(self, state, mean, server):
        return {"params": state["params"] + mean["delta"], "table": mean["table"]}


@pytest.mark.parametrize("engine", ENGINES)
def test_attackers_in_a_stack_are_rows_of_it(engine):
    attackers = Attackers(SignFlip(), names=("0", "1"))
    rounds = linear(Table()).rounds(digits(), engine=engine, attackers=attackers)
    rounds.go()
    table = rounds._simulator.driver.server.state["table"]
    np.testing.assert_allclose(table, np.full((2, 4), 0.6), rtol=1e-6)  # (8 - 2) / 10


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_attack_is_refused_alone(engine):
    attackers = Attackers(Boost(1e39), names=("9",))
    run = linear(algorithms.FedAvg()).simulate(digits(), engine=engine, attackers=attackers)
    assert run.history[0].accepted == 9


@dataclass(frozen=True)
class Part(algorithms.LocalRule):
    """Trains one part of the model only."""

    only: str
    needs: ClassVar = frozenset({"gradient"})

    def work(self, client, got, mine):
        local = client.train(got["params"], only=self.only)
        return local, {"delta": local.params - got["params"]}, mine


@pytest.mark.parametrize("engine", [Sequential(), Stacked(block=2)])
@pytest.mark.parametrize("only", ["private", "shared"])
def test_weight_decay_leaves_the_other_part_alone(only, engine):
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    learner = TorchLearner(
        torch.nn.Sequential(*layers), lr=0.1, batch_size=10,
        optimizer=partial(torch.optim.SGD, weight_decay=0.5),
    )  # fmt: skip
    plan = replace(linear(algorithms.FedAvg(local=Part(only))), learner=learner, private=("2.*",))
    rounds = plan.rounds(digits(4), engine=engine)
    simulator = rounds._simulator
    before = simulator.driver.server.state["params"].copy()
    rounds.go()
    shared = np.abs(simulator.driver.server.state["params"] - before).max()
    blank = simulator.driver.server.blank["params"]
    own = [np.abs(state["private/params"] - blank).max() for _, state in simulator.states.values()]
    assert (shared == 0) == (only == "private") and (max(own) == 0) == (only == "shared")
