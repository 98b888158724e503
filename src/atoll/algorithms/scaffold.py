"""SCAFFOLD: control variates take the drift out of local training.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: "SCAFFOLD: Stochastic controlled averaging for
federated learning", ICML 2020, algorithm 1. Option I renews a client's control variate by the
gradient at the received model, option II from the path just walked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from atoll.aggregation.schema import Shape
from atoll.algorithms.client import Client
from atoll.algorithms.fedavg import FedAvg
from atoll.algorithms.local import LocalRule
from atoll.algorithms.server import SGD, ServerOptimizer
from atoll.core.updates import Aggregate
from atoll.core.vectors import Array, Layout, Vectors
from atoll.errors import ConfigurationError
from atoll.learners.base import Ability, Affine, Learner, LocalResult


@dataclass(frozen=True)
class ControlVariates(LocalRule):
    """Clients descend along gradient - c_i + c; c_i stays with the client, c is their mean."""

    option: Literal["I", "II"] = "II"

    needs: ClassVar[frozenset[Ability]] = frozenset({"gradient"})
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.option not in ("I", "II"):
            raise ConfigurationError(f"option must be 'I' or 'II', not {self.option!r}")

    def reports(self, shared: Layout) -> Mapping[str, Shape]:
        return {"control": shared.size}

    def init(self, params: Array) -> Vectors:
        return {"control": np.zeros_like(params)}

    def remember(self, got: Vectors, shared: Layout) -> Vectors:
        return {"control": np.zeros_like(got["params"])}

    def correction(self, got: dict[str, Array], mine: dict[str, Array]) -> Affine:
        return Affine(constant=got["control"] - mine["control"])

    def finish(
        self, client: Client, local: LocalResult, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        if self.option == "I":
            control = client.gradient(got["params"])
        else:
            delta = local.params - got["params"]
            control = mine["control"] - got["control"] - delta / local.path
        return {"control": control - mine["control"]}, {"control": control}

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        return {"control": state["control"] + mean.participation * mean["control"]}

    def check(self, learner: Learner) -> None:
        if self.option == "II" and not learner.plain_sgd:
            raise ConfigurationError(
                "SCAFFOLD's option II recovers the mean gradient from the path of plain SGD; with "
                "another local optimiser use Scaffold(option='I')"
            )


def Scaffold(
    *,
    server: ServerOptimizer | None = None,
    option: Literal["I", "II"] = "II",
    weighting: Literal["examples", "uniform", "work"] = "uniform",
) -> FedAvg:
    """FedAvg with control variates.

    The mean is uniform, as in the paper; weighting by examples is exact under full participation.
    """
    return FedAvg(local=ControlVariates(option), server=server or SGD(), weighting=weighting)
