"""FedAdagrad: the mean change is a gradient for Adagrad at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: "Adaptive federated optimization",
ICLR 2021, algorithm 2 (line 9), with its initial v = tau^2 and without bias correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atoll.algorithms.fedavg import FedAvg
from atoll.core.updates import Aggregate
from atoll.core.vectors import Vector, Vectors
from atoll.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedAvg):
    """m <- beta1 * m + (1 - beta1) * d;  v by `second`;  params += server_lr * m / (sqrt(v) + tau).

    d is the mean change; here v <- v + d^2.

    Args:
        beta1: decay of the mean of changes.
        tau: degree of adaptivity; smaller is more adaptive.
    """

    server_lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta1 < 1 or not self.tau > 0:
            raise ConfigurationError("beta1 must be in [0, 1) and tau must be positive")

    def init(self, params: Vector) -> Vectors:
        return {
            "params": params,
            "first": np.zeros_like(params),
            "second": np.full_like(params, self.tau**2),
        }

    def second(self, second: Vector, squared: Vector) -> Vector:
        """The next v."""
        return second + squared

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        delta = mean["delta"]
        first = self.beta1 * state["first"] + (1 - self.beta1) * delta
        second = self.second(state["second"], delta * delta)
        change = self.server_lr * first / (np.sqrt(second) + self.tau)
        return {"params": state["params"] + change, "first": first, "second": second}
