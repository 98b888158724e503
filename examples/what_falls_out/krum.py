"""Krum (Blanchard et al., NeurIPS 2017) over buckets (Karimireddy et al., ICLR 2022)."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Ask, Gathered, Reducer
from atoll.core.updates import Aggregate
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class Krum(Reducer):
    faulty: int
    bucket: int = 1

    def fewest(self):
        return self.bucket * (2 * self.faulty + 2) + 1

    def open(self, schema):
        return Gathered()

    def talk(self, schema, talk):
        ask = Ask("update", self.open(schema), schema, works=True, fewest=self.fewest())
        heard = yield ask
        rows = np.stack([heard.into[sender]["delta"] for sender in heard.senders]).astype(float)
        order = talk.key.fold("buckets").generator().permutation(len(rows))
        cuts = np.split(rows[order], range(self.bucket, len(rows), self.bucket))
        means = np.stack([each.mean(0) for each in cuts])
        square = ((means[:, None] - means) ** 2).sum(-1)
        near = np.sort(square, axis=1)[:, 1 : len(means) - self.faulty - 1].sum(1)
        chosen = means[near.argmin()].astype(np.float32)
        return Aggregate({"delta": chosen}, {}, len(rows), len(rows), talk.population)


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(weighting="uniform"),
    schedule=schedules.Synchronous(rounds=3, minimum=5),
    pipeline=Krum(faulty=1),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
