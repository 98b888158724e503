"""Server optimisers: what the server makes of the mean change of a round.

One of the three parts that `FedAvg` is composed of: a pair of pure functions, `init` and `step`, as
in optax. The mean change is minus a gradient: "pseudo-gradient descent".

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: "Adaptive federated optimization",
ICLR 2021, algorithms 1 and 2, with their initial v = tau^2 and without bias correction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from atoll.core.numbers import below_one, plain_numbers, positive
from atoll.core.vectors import Vector, Vectors


@dataclass(frozen=True)
class ServerOptimizer(ABC):
    """`lr` is what the step is multiplied by."""

    lr: float

    #: As `Algorithm.elementwise`, of `step`; a class that is derived must say it again.
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        positive("lr", self.lr)

    def init(self, params: Vector) -> Vectors:
        """What it remembers, before the first round: named arrays [P]."""
        return {}

    @abstractmethod
    def step(self, params: Vector, delta: Vector, memory: Vectors) -> tuple[Vector, Vectors]:
        """The next parameters [P] and memory, from the mean change [P]."""


@dataclass(frozen=True)
class SGD(ServerOptimizer):
    """params += lr * d; at lr = 1 the mean of the clients' models (ICLR 2021, algorithm 1)."""

    lr: float = 1.0

    elementwise: ClassVar[bool] = True

    def step(self, params: Vector, delta: Vector, memory: Vectors) -> tuple[Vector, Vectors]:
        return params + self.lr * delta, {}


@dataclass(frozen=True)
class Momentum(ServerOptimizer):
    """v <- momentum * v + d;  params += lr * v.

    Hsu, Qi, Brown: "Measuring the effects of non-identical data distribution for federated visual
    classification", 2019, section 4.3.
    """

    lr: float = 1.0
    momentum: float = 0.9

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("momentum", self.momentum)

    def init(self, params: Vector) -> Vectors:
        return {"velocity": np.zeros_like(params)}

    def step(self, params: Vector, delta: Vector, memory: Vectors) -> tuple[Vector, Vectors]:
        velocity = self.momentum * memory["velocity"] + delta
        return np.asarray(params + self.lr * velocity, params.dtype), {"velocity": velocity}


@dataclass(frozen=True)
class Adagrad(ServerOptimizer):
    """m <- beta1 * m + (1 - beta1) * d;  v by `second`;  params += lr * m / (sqrt(v) + tau).

    d is the mean change; here v <- v + d^2 (ICLR 2021, algorithm 2, line 9).

    Args:
        beta1: decay of the mean of changes.
        tau: degree of adaptivity; smaller is more adaptive.
    """

    lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("beta1", self.beta1)
        positive("tau", self.tau)

    def init(self, params: Vector) -> Vectors:
        return {"first": np.zeros_like(params), "second": np.full_like(params, self.tau**2)}

    def second(self, second: Vector, squared: Vector) -> Vector:
        """The next v."""
        return second + squared

    def step(self, params: Vector, delta: Vector, memory: Vectors) -> tuple[Vector, Vectors]:
        first = self.beta1 * memory["first"] + (1 - self.beta1) * delta
        second = self.second(memory["second"], delta * delta)
        change = self.lr * first / (np.sqrt(second) + self.tau)
        return np.asarray(params + change, params.dtype), {"first": first, "second": second}


@dataclass(frozen=True)
class Adam(Adagrad):
    """Adagrad with v <- beta2 * v + (1 - beta2) * d^2 (ICLR 2021, algorithm 2, line 11)."""

    beta1: float = 0.9
    beta2: float = 0.99

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one("beta2", self.beta2)

    def second(self, second: Vector, squared: Vector) -> Vector:
        return self.beta2 * second + (1 - self.beta2) * squared


@dataclass(frozen=True)
class Yogi(Adam):
    """Adagrad with v <- v - (1 - beta2) * d^2 * sign(v - d^2) (ICLR 2021, algorithm 2, line 10)."""

    elementwise: ClassVar[bool] = True

    def second(self, second: Vector, squared: Vector) -> Vector:
        return np.asarray(second - (1 - self.beta2) * squared * np.sign(second - squared))
