"""Noise for central privacy that finds its sensitivity in Clip, and its cohort in the schedule."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean, Stage
from atoll.errors import ConfigurationError
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class CentralNoise(Stage):
    multiplier: float
    expected: float = 0.0

    secret = True
    hides_metrics = True

    def bind(self, setting):
        covered = {name for names in setting.bounds for name in names}
        if not setting.at_server or set(setting.schema.vectors) - covered:
            raise ConfigurationError("bound them first: Clip(...) >> Mean() >> CentralNoise(...)")
        if setting.schema.weighted or setting.sampling.most > 1:
            raise ConfigurationError("every client counts once: weighting='uniform', Synchronous")
        return replace(self, expected=float(setting.sampling.cohort or 0))

    def release(self, aggregate, state, key):
        expected = self.expected or aggregate.population
        std = self.multiplier * max(aggregate.bounds.values()) / expected
        rng, share = key.generator(), np.float32(aggregate.weight / expected)
        noised = {
            name: share * vector + np.float32(std) * rng.standard_normal(vector.shape, np.float32)
            for name, vector in aggregate.vectors.items()
        }
        return replace(aggregate, vectors=noised, measurements={"noise_std": std}), state


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3, cohort=6)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(weighting="uniform"),
    schedule=schedule,
    pipeline=Clip(0.5) >> Mean() >> CentralNoise(1.0),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
