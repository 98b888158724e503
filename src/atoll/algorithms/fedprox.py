"""FedProx: a proximal term keeps local training near the received model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated optimization in heterogeneous networks",
MLSys 2020, equation 2: clients minimise F_k(w) + mu / 2 * ||w - w_t||^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atoll.algorithms.fedavg import FedAvg, at_least_zero
from atoll.core.vectors import Array
from atoll.learners.base import Affine


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients descend along gradient + mu * (w - w_t); mu = 0 is FedAvg."""

    mu: float

    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero("mu", self.mu)

    def correction(self, got: dict[str, Array], mine: dict[str, Array]) -> Affine:
        return Affine(scale=self.mu, constant=-self.mu * got["params"])
