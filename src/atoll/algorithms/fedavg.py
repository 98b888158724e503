"""FedAvg: train locally, average the changes.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: "Communication-efficient learning of deep networks
from decentralized data", AISTATS 2017, algorithm 1. The server learning rate is that of Reddi et
al., "Adaptive federated optimization", ICLR 2021, algorithm 1; at 1 the two are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.client import Client
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Vector, Vectors
from atoll.errors import ConfigurationError
from atoll.learners.base import Correction, Learner, LocalResult


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Federated averaging, and the base of every algorithm whose clients run the local loop.

    Such an algorithm overrides `correction` (what to descend along), `finish` (what to report) or
    `step` (what the server does).

    Args:
        weighting: a client's share in the mean: its "examples", "uniform", or the "work" it did
            (examples gone over), which counts partial work as such.
        server_lr: what the mean change is multiplied by.
    """

    weighting: Literal["examples", "uniform", "work"] = "examples"
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "uniform", "work"):
            raise ConfigurationError(
                f"weighting must be examples, uniform or work, not {self.weighting!r}"
            )
        positive("server_lr", self.server_lr)

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.weighting != "uniform"

    def init(self, params: Vector) -> Vectors:
        return {"params": params}

    def correction(self, got: dict[str, Array], mine: dict[str, Array]) -> Correction | None:
        """What to descend along instead of the gradient; None is the gradient itself."""
        return None

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        local = client.train(got["params"], self.correction(got, mine))
        return self.finish(client, local, got, mine)

    def finish(
        self, client: Client, local: LocalResult, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        """The update and the new memory, from the trained parameters."""
        return self.report(local, delta=local.params - got["params"]), mine

    def report(self, local: LocalResult, **vectors: Array) -> Update:
        """An update of these vectors, weighted and measured as this algorithm says."""
        weight = {"examples": local.examples, "uniform": 1, "work": local.seen}[self.weighting]
        metrics = {"train_loss": local.loss, "steps": local.steps, "seen": local.seen}
        return Update(vectors, weight=weight, metrics=metrics)

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        return {**state, "params": state["params"] + self.server_lr * mean["delta"]}

    def check(self, learner: Learner) -> None:
        if self.needs_gradients and "gradient" not in learner.abilities:
            raise ConfigurationError(
                f"{type(self).__name__} changes the local gradient, but {type(learner).__name__} "
                "can only fit; use FedAvg or one of the server optimisers with it"
            )


def positive(name: str, value: float) -> None:
    """Raise `ConfigurationError` unless a hyper-parameter is a positive finite number."""
    if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
        raise ConfigurationError(f"{name} must be positive and finite, not {value!r}")


def at_least_zero(name: str, value: float) -> None:
    """Raise `ConfigurationError` unless a hyper-parameter is a finite number of at least 0."""
    if not (isinstance(value, int | float) and value >= 0 and math.isfinite(value)):
        raise ConfigurationError(f"{name} must be at least 0 and finite, not {value!r}")
