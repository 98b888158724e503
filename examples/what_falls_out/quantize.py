"""Quantize to a byte (QSGD-like, Alistarh et al., NeurIPS 2017), both ways; packed on the wire."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean, Spec, Stage
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class Quantize(Stage):
    """Stochastic rounding to 256 levels between the least and the greatest value."""

    lossy = True

    def sends(self, schema):
        vectors = {name: Spec(spec.shape, "uint8") for name, spec in schema.vectors.items()}
        return replace(schema, vectors={**vectors, "ends": Spec((len(vectors), 2))})

    def encode(self, update, told, memory, key):
        rng, ends, packed = key.generator(), [], {}
        for name, vector in update.vectors.items():
            low, high = float(vector.min()), float(vector.max())
            level = (vector.astype(float) - low) * (255 / max(high - low, 1e-30))
            packed[name] = np.floor(level + rng.random(vector.shape)).clip(0, 255).astype(np.uint8)
            ends.append([low, high])
        return replace(update, vectors={**packed, "ends": np.array(ends, np.float32)}), memory

    def decode(self, update, schema):
        ends = update.vectors["ends"].astype(float)
        levels = zip(schema.vectors, ends, strict=True)
        found = {n: low + update.vectors[n] * ((high - low) / 255) for n, (low, high) in levels}
        return replace(update, vectors={n: v.astype(np.float32) for n, v in found.items()})


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(),
    schedule=schedule,
    pipeline=Clip(1.0) >> Quantize() >> Mean(),
    download=Quantize(),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
