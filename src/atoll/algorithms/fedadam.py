"""FedAdam: the mean change is a gradient for Adam at the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: "Adaptive federated optimization",
ICLR 2021, algorithm 2 (line 11).
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.algorithms.fedadagrad import FedAdagrad
from atoll.core.vectors import Vector
from atoll.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedAdagrad):
    """FedAdagrad with v <- beta2 * v + (1 - beta2) * d^2."""

    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta2 < 1:
            raise ConfigurationError(f"beta2 must be in [0, 1), not {self.beta2}")

    def second(self, second: Vector, squared: Vector) -> Vector:
        return self.beta2 * second + (1 - self.beta2) * squared
