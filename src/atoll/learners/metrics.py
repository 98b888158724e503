"""Metrics: figures from sums that add, a task's and people's own, and which way each is good."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.sums import (
    CONFUSION_LIMIT,
    SCORE_BINS,
    Sums,
    add,
    classification_sums,
    multilabel_sums,
    regression_sums,
    token_sums,
)
from atoll.data.tasks import TASKS, Task, task_of
from atoll.errors import ConfigurationError

__all__ = [
    "CONFUSION_LIMIT", "HIGHER_IS_BETTER", "SCORE_BINS", "Metric", "Metrics", "Sums", "add",
    "check_metrics", "classification_sums", "directions", "figures", "main_metric",
    "more_is_better", "multilabel_sums", "own_figures", "own_sums", "regression_sums", "spread",
    "token_sums",
]  # fmt: skip

#: Of atoll's own metrics, those of which more is better.
HIGHER_IS_BETTER = frozenset[str]().union(*(task.higher for task in TASKS.values()))

#: What the sums of people's own metrics are called among a task's.
OWN, ROWS = "own ", " rows"
#: Names that files, plots and command lines can hold.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.@-]*")


@dataclass(frozen=True)
class Metric:
    """A metric of people's own: what to count of a batch, and what the counts come to.

    Args:
        sums: (outputs, targets) -> a number or an array that adds up over batches and clients;
            both are NumPy arrays [B, ...], the outputs as float32.
        value: the added sums -> the figure, NaN where it is not defined; None divides by how many
            examples there are.
        higher: whether more is better.
        per_client: whether it means something on one client's own test part; if not, it is refused
            in the spread over clients.
    """

    sums: Callable[[NDArray[Any], NDArray[Any]], Any]
    value: Callable[[Any], float] | None = None
    higher: bool = True
    per_client: bool = True


#: Metrics of people's own by name.
Metrics = Mapping[str, Metric]
NOTHING: Mapping[str, bool] = MappingProxyType({})


def check_metrics(metrics: Metrics | None) -> None:
    """Raise `ConfigurationError` unless these are metrics by names that can be told apart."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigurationError(f"metrics must be a dict of names to Metric(...), not {metrics!r}")
    for name, metric in (metrics or {}).items():
        if not isinstance(metric, Metric):
            raise ConfigurationError(f"metric {name!r} must be a Metric(...), not {metric!r}")
        if not NAME.fullmatch(str(name)) or "_client_" in name:
            raise ConfigurationError(
                f"a metric cannot be called {name!r}: use letters, digits and any of _ . @ -, "
                "without '_client_', which marks the spread over clients"
            )


def own_sums(metrics: Metrics | None, outputs: NDArray[Any], targets: NDArray[Any]) -> Sums:
    """What people's own metrics count of a batch."""
    found: Sums = {}
    for name, metric in (metrics or {}).items():
        try:
            found[OWN + name] = np.array(metric.sums(outputs, targets), np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the sums of metric {name!r} do not become a number or an array: {error}"
            ) from error
        found[OWN + name + ROWS] = np.array(len(targets), np.float64)
    return found


def own_figures(metrics: Metrics | None, sums: Sums) -> dict[str, float]:
    """The figures of people's own metrics."""
    found = {}
    for name, metric in (metrics or {}).items():
        if OWN + name in sums:
            total = sums[OWN + name]
            value = metric.value
            found[name] = float(total / sums[OWN + name + ROWS] if value is None else value(total))
    return found


def figures(sums: Sums, task: Task | str) -> dict[str, float]:
    """A task's metrics, from sums; an undefined one is NaN. Empty where nothing was counted."""
    if not sums or not float(sums.get("count", 1.0)):
        return {}
    return task_of(task).figures(sums)


def main_metric(metrics: Container[str]) -> str:
    """The metric to show first: clients' own, where there is no one model that has metrics.

    The loss in training comes last, and only as what is there where nothing was evaluated.
    """
    for name in ("accuracy", "loss", "accuracy_client_mean", "loss_client_mean", "train_loss"):
        if name in metrics:
            return name
    return "loss"


def directions(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, bool]:
    """Whether more is better, by metric, as the description of a run says of people's own.

    `config` is the described federation (`run.config`), `data` the population (`run.data`).
    """
    learner = config.get("learner")
    own = (learner.get("metrics") if isinstance(learner, Mapping) else None) or {}
    found = {str(name): bool(high) for name, high in (data.get("metrics") or {}).items()}
    return found | {name: bool(told["higher"]) for name, told in own.items() if "higher" in told}


def more_is_better(metric: str, own: Mapping[str, bool] = NOTHING) -> bool:
    """Whether more of a metric is better, also of its spread; `own` knows of people's own."""
    name, _, over_clients = metric.partition("_client_")
    if over_clients == "std":
        return False
    return own.get(name, name in HIGHER_IS_BETTER)


#: What is told of a metric's spread over clients.
SPREAD = ("mean", "std", "worst", "count")


def spread(
    values: Sequence[float], metric: str, own: Mapping[str, bool] = NOTHING
) -> dict[str, float]:
    """How a metric is distributed over clients: mean, standard deviation, worst tenth.

    `worst` is the mean over the worst ceil(N / 10) clients; NaN values are left out, and `count`
    says how many are not.
    """
    known = np.array([value for value in values if not math.isnan(value)], np.float64)
    if not len(known):
        return {}
    ordered = np.sort(known) if more_is_better(metric, own) else -np.sort(-known)
    tail = ordered[: math.ceil(len(ordered) / 10)]
    return {
        f"{metric}_client_mean": float(known.mean()),
        f"{metric}_client_std": float(known.std()),
        f"{metric}_client_worst": float(tail.mean()),
        f"{metric}_client_count": float(len(known)),
    }
