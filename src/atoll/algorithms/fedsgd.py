"""FedSGD: one gradient per client and round, over all of its data.

McMahan et al., AISTATS 2017, section 2: w <- w - eta * sum_k (n_k / n) g_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from atoll.algorithms.client import Client
from atoll.algorithms.fedavg import FedAvg
from atoll.updates import Aggregate, Update
from atoll.vectors import Array, Vectors


@dataclass(frozen=True, kw_only=True)
class FedSGD(FedAvg):
    """Distributed gradient descent; the learner's own rate, batches and epochs are not used.

    Args:
        lr: eta, the step along the averaged gradient.
    """

    lr: float

    reports: ClassVar[tuple[str, ...]] = ("gradient",)
    needs_gradients: ClassVar[bool] = True

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        gradient = client.gradient(got["params"], keep_statistics=True)
        examples = len(client.examples)
        weight = examples if self.weighted else 1
        return Update({"gradient": gradient}, weight=weight, metrics={"seen": examples}), mine

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        return {"params": state["params"] - self.lr * mean["gradient"]}
