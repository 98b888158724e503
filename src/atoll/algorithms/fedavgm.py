"""FedAvgM: momentum at the server.

Hsu, Qi, Brown: "Measuring the effects of non-identical data distribution for federated visual
classification", 2019, section 4.3: v <- beta * v + d, w <- w + v, with d the mean change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atoll.algorithms.fedavg import FedAvg
from atoll.core.updates import Aggregate
from atoll.core.vectors import Vector, Vectors
from atoll.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """v <- momentum * v + mean change;  params <- params + server_lr * v."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"momentum must be in [0, 1), not {self.momentum}")

    def init(self, params: Vector) -> Vectors:
        return {"params": params, "velocity": np.zeros_like(params)}

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        velocity = self.momentum * state["velocity"] + mean["delta"]
        return {"params": state["params"] + self.server_lr * velocity, "velocity": velocity}
