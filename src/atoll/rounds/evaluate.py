"""Evaluation of a model on a population: pooled figures and their spread over clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import Vectors
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.errors import DataError
from atoll.learners.base import Learner
from atoll.learners.metrics import spread
from atoll.rounds.plan import Evaluation, Plan
from atoll.rounds.task import ClientTask, Received, at_work

#: Clients evaluated together; their rows share batches.
GROUP = 1024
#: What the models of clients that are evaluated together may come to.
OWN_BYTES = 64 << 20


@dataclass(frozen=True)
class ClientFigures:
    """Each client's own metrics on its test part: values [N], NaN where it has none."""

    values: dict[str, NDArray[np.float64]]

    def by_name(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """The same by client, without those that have no value."""
        known = {
            metric: {
                name: float(value)
                for name, value in zip(names, values, strict=True)
                if not math.isnan(value)
            }
            for metric, values in self.values.items()
        }
        return {metric: values for metric, values in known.items() if values}

    def spread(self) -> dict[str, float]:
        """Mean, deviation and worst tenth of each metric."""
        return {
            name: value
            for metric, values in self.values.items()
            for name, value in spread(list(values), metric).items()
        }


def evaluate_pooled(learner: Learner, model: Vectors, data: FederatedData) -> dict[str, float]:
    """Metrics on the global test part; empty if there is none."""
    if not model or not len(data.test_part):
        return {}
    sums = learner.evaluate(model, data.test_part, data.task, data.classes)
    return learner.figures(sums, data.task)


def evaluate_clients(
    learner: Learner, model: Vectors, data: FederatedData, metrics: tuple[str, ...]
) -> ClientFigures:
    """Metrics of one model on every client's own test part."""
    values = {metric: np.full(len(data), math.nan) for metric in metrics}
    members = data.tested().tolist()
    for start in range(0, len(members), GROUP):
        group = members[start : start + GROUP]
        parts = [data.test(client) for client in group]
        each = learner.evaluate_each(model, parts, data.task, data.classes)
        for client, sums in zip(group, each, strict=True):
            own = learner.figures(sums, data.task)
            for metric in metrics:
                values[metric][client] = own.get(metric, math.nan)
    return ClientFigures(values)


def own_model(plan: Plan, received: Received, task: ClientTask, examples: Examples) -> Vectors:
    """The whole model that one client itself would use: what it is judged by, and may keep."""
    client, got, mine = at_work(plan, received, task, examples)
    return client.whole(plan.algorithm.own(client, got, mine))


def has_own_models(plan: Plan) -> bool:
    """Whether clients are judged by other models than the one that is published."""
    return plan.algorithm.personal or not plan.split.trivial


def evaluate_own(
    plan: Plan,
    data: FederatedData,
    received: Received,
    task_of: Callable[[int], ClientTask],
    metrics: tuple[str, ...],
) -> ClientFigures:
    """Metrics of each client's own model on its own test part."""
    learner = plan.learner
    values = {metric: np.full(len(data), math.nan) for metric in metrics}
    members = data.tested().tolist()
    size = max(1, min(GROUP, OWN_BYTES // max(4 * learner.layout.size, 1)))
    for start in range(0, len(members), size):
        group = members[start : start + size]
        models = [own_model(plan, received, task_of(c), data.train(c)) for c in group]
        stacked = {name: np.stack([model[name] for model in models]) for name in models[0]}
        parts = [data.test(client) for client in group]
        each = learner.evaluate_each(stacked, parts, data.task, data.classes)
        for client, sums in zip(group, each, strict=True):
            own = learner.figures(sums, data.task)
            for metric in metrics:
                values[metric][client] = own.get(metric, math.nan)
    return ClientFigures(values)


def spread_metrics(evaluation: Evaluation, data: FederatedData) -> tuple[str, ...]:
    """The metrics whose spread is reported: accuracy, or the loss where there is none."""
    if evaluation.spread is not None:
        return evaluation.spread
    return ("loss",) if data.task == "regression" else ("accuracy",)


def check_evaluation(plan: Plan, data: FederatedData) -> None:
    """Raise `DataError` if a metric that is asked for cannot be had on these data."""
    evaluation = plan.evaluation
    metrics = spread_metrics(evaluation, data)
    asked = [*metrics, *([evaluation.best] if evaluation.best else [])]
    known = {
        "classification": {"loss", "accuracy", "macro_f1", "auc"},
        "regression": {"loss", "mae", "rmse", "r2"},
        "tokens": {"loss", "accuracy", "perplexity"},
    }[data.task]
    open_ended = type(plan.learner).figures is not Learner.figures
    for metric in asked:
        if metric not in known and not open_ended:
            raise DataError(
                f"{data.name} is a {data.task} set, for which {metric!r} is not known; "
                f"use {', '.join(sorted(known))}"
            )
    if "auc" in asked and data.classes != 2:
        raise DataError(f"AUC needs two classes; {data.name} has {data.classes}")
    if "auc" in metrics and evaluation.clients_every is not None:
        for client in data.tested().tolist():
            labels = np.unique(data.test(client).all()[1])
            if len(labels) == 1:
                raise DataError(
                    f"the test part of client {data.names[client]!r} has only class {labels[0]}, "
                    "so its AUC is not defined; leave 'auc' out of the spread (the pooled AUC is "
                    "still reported), or give that client more test examples"
                )
