"""SCAFFOLD: control variates take the drift out of local training.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: "SCAFFOLD: Stochastic controlled averaging for
federated learning", ICML 2020, algorithm 1. Option I renews a client's control variate by the
gradient at the received model, option II from the path just walked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from atoll.algorithms.client import Client
from atoll.algorithms.fedavg import FedAvg
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Vector, Vectors
from atoll.errors import ConfigurationError
from atoll.learners.base import Affine, Learner, LocalResult


@dataclass(frozen=True, kw_only=True)
class Scaffold(FedAvg):
    """Clients descend along gradient - c_i + c; c_i stays with the client, c is their mean.

    The mean is uniform, as in the paper; weighting by examples is exact under full participation.
    """

    weighting: Literal["examples", "uniform", "work"] = "uniform"
    option: Literal["I", "II"] = "II"

    reports: ClassVar[tuple[str, ...]] = ("delta", "control")
    needs_gradients: ClassVar[bool] = True

    def init(self, params: Vector) -> Vectors:
        return {"params": params, "control": np.zeros_like(params)}

    def broadcast(self, state: Vectors) -> Vectors:
        return state

    def remember(self, params: Vector) -> Vectors:
        return {"control": np.zeros_like(params)}

    def correction(self, got: dict[str, Array], mine: dict[str, Array]) -> Affine:
        return Affine(constant=got["control"] - mine["control"])

    def finish(
        self, client: Client, local: LocalResult, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        delta = local.params - got["params"]
        if self.option == "I":
            control = client.gradient(got["params"])
        else:
            control = mine["control"] - got["control"] - delta / local.path
        return self.report(local, delta=delta, control=control - mine["control"]), {
            "control": control
        }

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        return {
            "params": state["params"] + self.server_lr * mean["delta"],
            "control": state["control"] + mean.participation * mean["control"],
        }

    def check(self, learner: Learner) -> None:
        super().check(learner)
        if self.option not in ("I", "II"):
            raise ConfigurationError(f"option must be 'I' or 'II', not {self.option!r}")
        if self.option == "II" and not learner.plain_sgd:
            raise ConfigurationError(
                "SCAFFOLD's option II recovers the mean gradient from the path of plain SGD; with "
                "another local optimiser use Scaffold(option='I')"
            )
