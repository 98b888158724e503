"""TopK with error feedback (Stich et al., NeurIPS 2018): the greatest entries and their places."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Mean, Spec, Stage
from atoll.errors import UpdateRefused
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class TopK(Stage):
    count: int

    lossy = True

    def sends(self, schema):
        places = Spec((self.count,), "uint32")
        return replace(schema, vectors={"delta": Spec((self.count,)), "places": places})

    def remember(self, schema):
        return {"rest": schema.vectors["delta"].zeros()}

    def encode(self, update, told, memory, key):
        whole = update.vectors["delta"] + memory["rest"]
        at = np.sort(np.argsort(-np.abs(whole), kind="stable")[: self.count])
        rest = whole.copy()
        rest[at] = 0
        vectors = {"delta": whole[at], "places": at.astype(np.uint32)}
        return replace(update, vectors=vectors), {"rest": rest}

    def decode(self, update, schema):
        whole, at = schema.vectors["delta"].zeros(), update.vectors["places"].astype(int)
        if at[-1] >= len(whole) or (np.diff(at) <= 0).any():
            raise UpdateRefused("its places do not increase within the vector")
        whole[at] = update.vectors["delta"]
        return replace(update, vectors={"delta": whole})


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(),
    schedule=schedule,
    pipeline=TopK(64) >> Mean(),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
