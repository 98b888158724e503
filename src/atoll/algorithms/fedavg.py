"""FedAvg: train locally, average the changes; composed of a local rule and a server optimiser.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: "Communication-efficient learning of deep networks
from decentralized data", AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll.aggregation.schema import Shape
from atoll.algorithms.algorithm import Algorithm, Start
from atoll.algorithms.checks import elementwise
from atoll.algorithms.client import Client
from atoll.algorithms.local import LocalRule, Plain
from atoll.algorithms.server import SGD, ServerOptimizer
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Array, Layout, Vectors, part, prefixed
from atoll.errors import ConfigurationError
from atoll.learners.base import Ability, Learner, LocalResult

WEIGHTINGS = ("examples", "uniform", "work")
#: Whose a vector of the server's state is.
SERVER, LOCAL = "server.", "local."


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Federated averaging, from three parts that are chosen apart.

    Args:
        local: what clients descend along and report (`algorithms.local`).
        server: what the server does with the mean change (`algorithms.server`).
        weighting: a client's weight in the mean: its "examples", "uniform", or the "work" it did
            (examples gone over), which counts partial work as such.
    """

    local: LocalRule = field(default_factory=Plain)
    server: ServerOptimizer = field(default_factory=SGD)
    weighting: Literal["examples", "uniform", "work"] = "examples"

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name in ("correction", "finish", "objective"):
            if name in vars(cls):
                raise ConfigurationError(
                    f"{cls.__name__}.{name} would never be called: write it in a LocalRule, and "
                    f"give FedAvg(local=...)"
                )

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ConfigurationError(
                f"weighting must be examples, uniform or work, not {self.weighting!r}"
            )
        for name, kind, where in (
            ("local", LocalRule, "algorithms.local"),
            ("server", ServerOptimizer, "algorithms.server"),
        ):
            given = getattr(self, name)
            if not isinstance(given, kind):
                hint = "; call it to make one" if isinstance(given, type) else ""
                raise ConfigurationError(f"{name} must be one of {where}, not {given!r}{hint}")

    @property
    def needs(self) -> frozenset[Ability]:  # type: ignore[override]
        return self.local.needs

    @property
    def passes(self) -> float:  # type: ignore[override]
        return self.local.passes

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.weighting != "uniform"

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return (
            type(self).step is FedAvg.step
            and elementwise(self.server)
            and elementwise(self.local, "step")
        )

    def reports(self, shared: Layout) -> Mapping[str, Shape]:
        more = self.local.reports(shared)
        if "delta" in more:
            raise ConfigurationError(
                f"{self.local!r} declares a 'delta' of its own; the change is reported anyway"
            )
        return {"delta": shared.size, **more}

    def init(self, start: Start) -> Vectors:
        kept = self.local.init(start.params)
        if "params" in kept:
            raise ConfigurationError(f"{self.local!r} keeps 'params', which are the model's own")
        return {
            "params": start.params,
            **prefixed(SERVER, self.server.init(start.params)),
            **prefixed(LOCAL, kept),
        }

    def broadcast(self, state: Vectors) -> Vectors:
        return {"params": state["params"], **part(LOCAL, state)}

    def remember(self, got: Vectors, shared: Layout) -> Vectors:
        return self.local.remember(got, shared)

    def work(
        self, client: Client, got: dict[str, Array], mine: dict[str, Array]
    ) -> tuple[Update, dict[str, Array]]:
        local, vectors, kept = self.local.work(client, got, mine)
        return self.report(local, **vectors), kept

    def own(self, client: Client, got: dict[str, Array], mine: dict[str, Array]) -> Array:
        return self.local.own(client, got, mine)

    @property
    def personal(self) -> bool:
        if type(self).own is not FedAvg.own:
            return True
        return type(self.local).own is not LocalRule.own

    def report(self, local: LocalResult, **vectors: Array) -> Update:
        """An update of these vectors, weighted and measured as this algorithm says."""
        weight = {"examples": local.examples, "uniform": 1, "work": local.seen}[self.weighting]
        metrics = {"train_loss": local.loss, "steps": local.steps, "seen": local.seen}
        return Update(vectors, weight=weight, metrics=metrics)

    def step(self, state: Vectors, mean: Aggregate, server: Client) -> Vectors:
        params, memory = self.server.step(state["params"], mean["delta"], part(SERVER, state))
        kept = self.local.step({"params": state["params"], **part(LOCAL, state)}, mean)
        return {"params": params, **prefixed(SERVER, memory), **prefixed(LOCAL, kept)}

    def check(self, learner: Learner) -> None:
        super().check(learner)
        self.local.check(learner)
