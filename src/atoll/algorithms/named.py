"""The named algorithms that are nothing but compositions: a local rule, a server optimiser."""

from __future__ import annotations

from typing import Literal

from atoll.algorithms.fedavg import FedAvg
from atoll.algorithms.local import Proximal
from atoll.algorithms.server import SGD, Adagrad, Adam, Momentum, ServerOptimizer, Yogi

Weighting = Literal["examples", "uniform", "work"]


def FedProx(
    mu: float, *, server: ServerOptimizer | None = None, weighting: Weighting = "examples"
) -> FedAvg:
    """A proximal term keeps local training near the received model (`local.Proximal`)."""
    return FedAvg(local=Proximal(mu), server=server or SGD(), weighting=weighting)


def FedAvgM(
    *, server_lr: float = 1.0, momentum: float = 0.9, weighting: Weighting = "examples"
) -> FedAvg:
    """Momentum at the server (`server.Momentum`)."""
    return FedAvg(server=Momentum(server_lr, momentum), weighting=weighting)


def FedAdagrad(
    *,
    server_lr: float = 0.1,
    beta1: float = 0.0,
    tau: float = 1e-3,
    weighting: Weighting = "examples",
) -> FedAvg:
    """Adagrad at the server (`server.Adagrad`)."""
    return FedAvg(server=Adagrad(server_lr, beta1, tau), weighting=weighting)


def FedAdam(
    *,
    server_lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weighting: Weighting = "examples",
) -> FedAvg:
    """Adam at the server (`server.Adam`)."""
    return FedAvg(server=Adam(server_lr, beta1, tau, beta2), weighting=weighting)


def FedYogi(
    *,
    server_lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weighting: Weighting = "examples",
) -> FedAvg:
    """Yogi at the server (`server.Yogi`): Adam whose second moment moves by bounded steps."""
    return FedAvg(server=Yogi(server_lr, beta1, tau, beta2), weighting=weighting)
