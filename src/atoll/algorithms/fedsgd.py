"""FedSGD: one gradient per client and round, over all of its data.

McMahan et al., AISTATS 2017, section 2: w <- w - eta * sum_k (n_k / n) g_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from atoll.algorithms.client import Client
from atoll.algorithms.fedavg import FedAvg
from atoll.algorithms.local import LocalRule
from atoll.algorithms.server import SGD, ServerOptimizer
from atoll.core.vectors import Array
from atoll.errors import ConfigurationError
from atoll.learners.base import Ability, LocalResult


@dataclass(frozen=True)
class FullGradient(LocalRule):
    """Report minus the gradient at the received model; rate, batches and epochs are not used."""

    needs: ClassVar[frozenset[Ability]] = frozenset({"gradient"})

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[LocalResult, dict[str, Array], dict[str, Array]]:
        gradient = client.gradient(got["params"], keep_statistics=True)
        count = client.count
        local = LocalResult(got["params"], 1, 1.0, count, count, math.nan)
        return local, {"delta": -gradient}, mine


def FedSGD(
    *,
    lr: float | None = None,
    server: ServerOptimizer | None = None,
    weighting: Literal["examples", "uniform", "work"] = "examples",
) -> FedAvg:
    """Distributed gradient descent: `lr` is eta, or another server optimiser takes the step."""
    if (lr is None) == (server is None):
        raise ConfigurationError("FedSGD takes a step of lr=..., or another one, server=...")
    return FedAvg(local=FullGradient(), server=server or SGD(lr or 0.0), weighting=weighting)
