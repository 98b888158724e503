"""FedLC (Zhang et al., ICML 2022): logits are calibrated by how often a client saw a label."""

from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn import functional

from atoll import Federation, algorithms, data, schedules
from atoll.learners import Objective, TorchLearner


def calibrated(outputs, targets, *, offset):
    return functional.cross_entropy(outputs - offset, targets)


@dataclass(frozen=True)
class Calibrated(algorithms.LocalRule):
    tau: float = 1.0

    needs = frozenset({"objective"})

    def objective(self, client, got, mine):
        def offset(holder):
            counts = np.bincount(holder.examples.all()[1], minlength=10)
            return self.tau * np.maximum(counts, 1e-2) ** -0.25

        return Objective(calibrated, given={"offset": client.each(offset)})


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner, algorithm=algorithms.FedAvg(local=Calibrated()), schedule=schedule
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
