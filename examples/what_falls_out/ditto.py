"""Ditto (Li et al., ICML 2021): an own model beside, pulled towards the shared one."""

from dataclasses import dataclass

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import Affine, TorchLearner


@dataclass(frozen=True)
class Ditto(algorithms.LocalRule):
    lam: float = 1.0

    needs = frozenset({"gradient"})
    passes = 2.0

    def remember(self, got, shared):
        return {"own": got["params"]}

    def finish(self, client, local, got, mine):
        pull = Affine(scale=self.lam, constant=-self.lam * got["params"])
        return {}, {"own": client.train(mine["own"], pull).params}

    def own(self, client, got, mine):
        return mine["own"]


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner, algorithm=algorithms.FedAvg(local=Ditto()), schedule=schedule
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
