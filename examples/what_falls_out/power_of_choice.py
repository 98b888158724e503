"""Power-of-choice (Cho et al., AISTATS 2022): poll losses, and train where they are greatest."""

from dataclasses import dataclass

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Ask, Gathered, Schema
from atoll.core.updates import Update
from atoll.learners import TorchLearner


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice(algorithms.FedAvg):
    keep: int = 3

    needs = frozenset({"outputs"})

    def talk(self, state, talk):
        heard = yield Ask("loss", Gathered(), Schema.of({"loss": 1}))
        losses = {sender: float(heard.into[sender]["loss"][0]) for sender in heard.senders}
        worst = set(sorted(heard.senders, key=losses.get)[-self.keep :])
        whom = tuple(sender for sender in heard.senders if sender in worst)
        return (yield algorithms.Gather({}, whom))

    def answer(self, name, client, got, mine, told):
        return Update({"loss": client.loss(got["params"])})


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3, cohort=6)
federation = Federation(learner=learner, algorithm=PowerOfChoice(), schedule=schedule)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
