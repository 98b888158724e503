"""Local rules: what clients descend along, and what they report of it.

One of the three parts that `FedAvg` is composed of. A rule overrides `correction` (what to descend
along), `objective` (what to minimise), `finish` (what to report and remember) or, where its clients
do not run the local loop, `work`; what it keeps at the server it says in `init` and `step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from atoll.aggregation.schema import Shape
from atoll.algorithms.client import Client
from atoll.core.numbers import at_least_zero, plain_numbers
from atoll.core.room import difference
from atoll.core.updates import Aggregate
from atoll.core.vectors import Array, Layout, Vectors
from atoll.learners.base import Ability, Affine, At, Correction, Learner, LocalResult, Objective


@dataclass(frozen=True)
class LocalRule:
    """Descend along the gradient, report the change: federated averaging's own rule."""

    needs: ClassVar[frozenset[Ability]] = frozenset()
    passes: ClassVar[float] = 1.0
    #: As `Algorithm.elementwise`, of `step`; a rule with another `step` must say it again.
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_numbers(self)

    def reports(self, shared: Layout) -> Mapping[str, Shape]:
        """Arrays that are reported beside the change."""
        return {}

    def init(self, params: Array) -> Vectors:
        """What the server keeps for this rule, beside the parameters; it is broadcast too."""
        return {}

    def remember(self, got: Vectors, shared: Layout) -> Vectors:
        """What a client remembers before its first round."""
        return {}

    def correction(self, got: dict[str, Array], mine: dict[str, Array]) -> Correction | At | None:
        """What to descend along instead of the gradient; None is the gradient itself."""
        return None

    def objective(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> Objective | None:
        """What to minimise instead of the learner's loss; None is the loss itself."""
        return None

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[LocalResult, dict[str, Array], dict[str, Array]]:
        """The local work, the arrays of the update ("delta" among them), and the new memory."""
        local = client.train(
            got["params"], self.correction(got, mine), objective=self.objective(client, got, mine)
        )
        vectors, kept = self.finish(client, local, got, mine)
        return local, {"delta": difference(local.params, got["params"]), **vectors}, kept

    def finish(
        self, client: Client, local: LocalResult, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What is reported beside the change, and the new memory."""
        return {}, mine

    def own(self, client: Client, got: dict[str, Array], mine: dict[str, Array]) -> Array:
        """The shared parameters [P] that this client itself would use, and is judged by."""
        return got["params"]

    def step(self, state: Vectors, mean: Aggregate) -> Vectors:
        """The next values of what `init` began."""
        return {}

    def check(self, learner: Learner) -> None:
        """Raise `ConfigurationError` if the rule cannot work with this learner."""


@dataclass(frozen=True)
class Plain(LocalRule):
    """Descend along the gradient (McMahan et al., AISTATS 2017, algorithm 1)."""


@dataclass(frozen=True)
class Proximal(LocalRule):
    """Descend along gradient + mu * (w - w_t), which keeps clients near the received model.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated optimization in heterogeneous networks",
    MLSys 2020, equation 2: clients minimise F_k(w) + mu / 2 * ||w - w_t||^2. mu = 0 is FedAvg.
    """

    mu: float

    needs: ClassVar[frozenset[Ability]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero("mu", self.mu)

    def correction(self, got: dict[str, Array], mine: dict[str, Array]) -> Affine:
        return Affine(scale=self.mu, constant=-self.mu * got["params"])
