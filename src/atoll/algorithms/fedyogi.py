"""FedYogi: Adam at the server whose second moment moves by steps of bounded size.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: "Adaptive federated optimization",
ICLR 2021, algorithm 2 (line 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atoll.algorithms.fedadam import FedAdam
from atoll.core.vectors import Vector


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedAdagrad with v <- v - (1 - beta2) * d^2 * sign(v - d^2)."""

    def second(self, second: Vector, squared: Vector) -> Vector:
        return np.asarray(second - (1 - self.beta2) * squared * np.sign(second - squared))
