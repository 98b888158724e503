"""IFCA (Ghosh et al., NeurIPS 2020): k models; each client trains the one that fits it best."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Spec
from atoll.learners import TorchLearner


@dataclass(frozen=True, kw_only=True)
class IFCA(algorithms.FedAvg):
    k: int = 2

    needs = frozenset({"outputs"})

    def reports(self, shared):
        return {f"delta{j}": Spec((shared.size,), optional=True) for j in range(self.k)}

    def init(self, start):
        return {f"model{j}": start.another(j) for j in range(self.k)}

    def model(self, state):
        return None  # there is no one model

    def broadcast(self, state):
        return state

    def chosen(self, client, got):
        losses = np.stack([client.loss(got[f"model{j}"]) for j in range(self.k)])
        hot = np.moveaxis(np.eye(self.k, dtype=np.float32)[losses.argmin(0)], -1, 0)
        return [client.learner.asarray(np.ascontiguousarray(each)) for each in hot]

    def own(self, client, got, mine):
        return sum(hot * got[f"model{j}"] for j, hot in enumerate(self.chosen(client, got)))

    def work(self, client, got, mine):
        hot, start = self.chosen(client, got), self.own(client, got, mine)
        local = client.train(start)
        update = self.report(local, **{f"delta{j}": local.params - start for j in range(self.k)})
        return replace(update, shares={f"delta{j}": h for j, h in enumerate(hot)}), mine

    def step(self, state, mean, server):
        return {f"model{j}": state[f"model{j}"] + mean[f"delta{j}"] for j in range(self.k)}


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(learner=learner, algorithm=IFCA(), schedule=schedule)


def clients():
    return data.load("digits").feature_shift(clients=8, rotations=2, seed=0)
