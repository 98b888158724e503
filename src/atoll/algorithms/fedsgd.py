"""FedSGD: one gradient per client and round, over all of its data.

McMahan et al., AISTATS 2017, section 2: w <- w - eta * sum_k (n_k / n) g_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atoll.algorithms.client import Client
from atoll.algorithms.fedavg import FedAvg, positive
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Vectors
from atoll.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class FedSGD(FedAvg):
    """Distributed gradient descent; the learner's own rate, batches and epochs are not used.

    Args:
        lr: eta, the step along the averaged gradient.
    """

    lr: float

    reports: ClassVar[tuple[str, ...]] = ("gradient",)
    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lr", self.lr)
        if self.server_lr != 1:
            raise ConfigurationError("FedSGD has one rate, lr; leave server_lr out")

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        gradient = client.gradient(got["params"], keep_statistics=True)
        weight = client.count if self.weighted else 1
        return Update({"gradient": gradient}, weight=weight, metrics={"seen": client.count}), mine

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        return {"params": state["params"] - self.lr * mean["gradient"]}
