"""FedNova (Wang et al., NeurIPS 2020): mean change per step, times the mean number of steps."""

from dataclasses import dataclass, replace

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class PerStep(algorithms.LocalRule):
    def reports(self, shared):
        return {"steps": 1}  # four bytes

    def work(self, client, got, mine):
        local = client.train(got["params"])
        change = (local.params - got["params"]) / local.steps
        return local, {"delta": change, "steps": local.steps}, mine


@dataclass(frozen=True, kw_only=True)
class FedNova(algorithms.FedAvg):
    local: PerStep = PerStep()

    def step(self, state, mean, server):
        change = mean["steps"] * mean["delta"]
        return super().step(state, replace(mean, vectors={"delta": change}), server)


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(learner=learner, algorithm=FedNova(), schedule=schedule)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
