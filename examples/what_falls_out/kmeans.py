"""Federated k-means (Lloyd): clients send sums and counts; there is no model vector."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from atoll import Federation, algorithms, data, schedules
from atoll.core.updates import Update
from atoll.core.vectors import Layout
from atoll.learners import Learner


class Points(Learner):
    """Data without a model of their own."""

    layout = Layout(())

    def init(self, key):
        return {}

    def train(self, model, examples, assignment, correction=None, objective=None):
        raise NotImplementedError("there is nothing to train")

    def evaluate(self, model, examples, task, classes):
        return {}

    def planned_steps(self, examples):
        return 1


@dataclass(frozen=True)
class KMeans(algorithms.Algorithm):
    k: int = 10
    width: int = 64

    weighted = False
    metrics = MappingProxyType({"inertia": (0.0, float("inf"))})

    def reports(self, shared):
        return {"sums": (self.k, self.width), "counts": self.k, "inertia": 1}

    def init(self, start):
        rng = start.key.fold("centres").generator()
        return {"centres": rng.uniform(0, 1, (self.k, self.width))}

    def broadcast(self, state):
        return state

    def work(self, client, got, mine):
        x = client.examples.all()[0].reshape(-1, self.width).astype(float)
        distances = ((x[:, None] - got["centres"]) ** 2).sum(-1)
        hot = np.eye(self.k)[distances.argmin(1)]
        found = {"sums": hot.T @ x, "counts": hot.sum(0), "inertia": distances.min(1).sum()}
        return Update(found, metrics={"inertia": found["inertia"]}), mine

    def step(self, state, mean, server):
        counts = mean.sum("counts")[:, None]
        centres = mean.sum("sums") / counts.clip(1)
        return {"centres": np.where(counts > 0.5, centres, state["centres"])}


federation = Federation(
    learner=Points(), algorithm=KMeans(), schedule=schedules.Synchronous(rounds=3)
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
