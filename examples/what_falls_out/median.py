"""A coordinate-wise median by bisection: no update leaves its client, only whether it is below."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Ask, Gathered, Mean, Reducer, Schema, Spec
from atoll.core.updates import Aggregate, Update
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class Bisection(Reducer):
    steps: int = 12

    def sends(self, schema):
        return replace(schema, vectors={"ends": Spec((2,))})

    takes = sends

    def open(self, schema):
        return Gathered()

    def talk(self, schema, talk):
        heard = yield Ask("update", self.open(schema), schema, works=True)
        ends = np.stack([heard.into[sender]["ends"] for sender in heard.senders])
        size = int(talk.state["size"][0])
        low, high = (np.full(size, end, np.float32) for end in (ends.min(), ends.max()))
        below = Schema.of({"below": size}, weights=(1.0, 1.0))
        for _ in range(self.steps):
            middle = (low + high) / 2
            heard = yield Ask("below", Mean().open(below), below, {"middle": middle})
            share = heard.into.close(talk.population, {}, talk.key)["below"]
            low, high = np.where(share < 0.5, middle, low), np.where(share < 0.5, high, middle)
        count = len(heard.senders)
        return Aggregate({"delta": (low + high) / 2}, {}, count, count, talk.population)

    def init(self, schema):
        return {"size": np.array([schema.vectors["delta"].size])}

    def seal(self, update, told, mail, kept, key):
        delta = update.vectors["delta"]
        ends = np.array([delta.min(), delta.max()], np.float32)
        return replace(update, vectors={"ends": ends}), {"delta": delta}

    def answer(self, name, told, mail, kept, key):
        return Update({"below": (kept["delta"] <= told["middle"]).astype(np.float32)}), kept


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(weighting="uniform"),
    schedule=schedule,
    pipeline=Bisection(),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
