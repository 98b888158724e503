"""Evaluation of a model on a population: pooled figures and their spread over clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.core.vectors import Tree, Vectors
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.data.tasks import Task
from atoll.errors import DataError
from atoll.learners.base import Learner
from atoll.learners.metrics import SPREAD, spread
from atoll.rounds.plan import Evaluation, Plan
from atoll.rounds.stopping import only
from atoll.rounds.task import ClientTask, Received, at_work

#: Clients evaluated together; their rows share batches.
GROUP = 1024
#: What the models of clients that are evaluated together may come to.
OWN_BYTES = 64 << 20
#: What the sums of clients that are evaluated together may come to.
SUMS_BYTES = 1 << 30


@dataclass(frozen=True)
class ClientFigures:
    """Each client's own metrics on its test part: values [N], NaN where it has none."""

    values: dict[str, NDArray[np.float64]]
    #: Of metrics of people's own, whether more is better.
    higher: dict[str, bool] = field(default_factory=dict)

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
            for name, value in spread(list(values), metric, self.higher).items()
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
    size = _together(data)
    for start in range(0, len(members), size):
        group = members[start : start + size]
        parts = [data.test(client) for client in group]
        each = learner.evaluate_each(model, parts, data.task, data.classes)
        for client, sums in zip(group, each, strict=True):
            own = learner.figures(sums, data.task)
            for metric in metrics:
                values[metric][client] = own.get(metric, math.nan)
    return ClientFigures(values, ways(learner, data))


def own_model(plan: Plan, received: Received, task: ClientTask, examples: Examples) -> Vectors:
    """The whole model that one client itself would use: what it is judged by, and may keep."""
    client, got, mine = at_work(plan, received, task, examples)
    return client.whole(plan.algorithm.own(client, got, mine))


def judged(member: int, client: str, round: int, key: Key, state: Tree) -> ClientTask:
    """The task by which a client's own model after a round is made, in a run with this key."""
    row = (member, client, round, round, 1.0, 1.0, 0)
    return ClientTask.read(row, key.fold("own", round), state)


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
    size = max(1, min(_together(data), OWN_BYTES // max(4 * learner.layout.size, 1)))
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
    return ClientFigures(values, ways(learner, data))


def _together(data: FederatedData) -> int:
    """How many clients' sums are held at the same time."""
    return max(1, min(GROUP, SUMS_BYTES // data.task.sums_bytes(data.classes)))


def ways(learner: Learner, data: FederatedData) -> dict[str, bool]:
    """Whether more is better, of every metric that learner and task say it of."""
    task = data.task
    known = {name: name in task.higher for name in task.metrics(data.classes)}
    return known | {name: metric.higher for name, metric in (learner.metrics or {}).items()}


def spread_metrics(evaluation: Evaluation, data: FederatedData) -> tuple[str, ...]:
    """The metrics whose spread is reported: the task's main one, where none are asked for."""
    return (data.task.main,) if evaluation.spread is None else evaluation.spread


def reported(plan: Plan, data: FederatedData) -> set[str]:
    """The metrics that rounds of this plan on these data will have, some of them or all."""
    task, evaluation, names = data.task, plan.evaluation, set[str]()
    known = {*task.metrics(data.classes), *(plan.learner.metrics or {})}
    if plan.split.trivial and len(data.test_part):
        names |= known
    if evaluation.clients_every is not None and len(data.tested()):
        names |= {f"{m}_client_{each}" for m in spread_metrics(evaluation, data) for each in SPREAD}
    return names


def check_evaluation(plan: Plan, data: FederatedData) -> None:
    """Raise `DataError` if a metric that is asked for cannot be had on these data."""
    evaluation, task, own = plan.evaluation, data.task, plan.learner.metrics or {}
    metrics = spread_metrics(evaluation, data)
    known = task.metrics(data.classes)
    for name in own:
        if name in known:
            raise DataError(
                f"{name!r} is a metric of every {task} set; call the learner's own another name"
            )
    # A learner that makes its own figures may give more than anybody knows.
    if type(plan.learner).figures is Learner.figures:
        best = [evaluation.best] if evaluation.best else []
        for metric in (*metrics, *(name.partition("_client_")[0] for name in best)):
            if metric not in known and metric not in own:
                told = f", with {data.classes} {task.noun}" if data.classes else ""
                raise DataError(
                    f"{data.name} is a {task} set{told}, for which {metric!r} is not known; "
                    f"use {', '.join(sorted({*known, *own}))}"
                )
    for metric in metrics:
        if metric in own and not own[metric].per_client:
            raise DataError(
                f"{metric!r} means nothing on one client's test part; leave it out of the spread"
            )
    if evaluation.clients_every is not None:
        _check_defined(metrics, data)
    if type(plan.learner).figures is Learner.figures and evaluation.best:
        names = reported(plan, data)
        if evaluation.best not in names:
            raise DataError(f"best={evaluation.best!r} is in no round: {only(names)}")


def _check_defined(metrics: tuple[str, ...], data: FederatedData) -> None:
    """Raise `DataError` if a metric has no value on some client's test part."""
    never = type(data.task).undefined is Task.undefined
    for client in () if never else data.tested().tolist():
        targets = data.test(client).all()[1]
        for metric in metrics:
            reason = data.task.undefined(metric, targets)
            if reason:
                raise DataError(
                    f"the test part of client {data.names[client]!r} {reason}, so its "
                    f"{metric.upper() if metric == 'auc' else metric} is not defined; leave "
                    f"{metric!r} out of the spread (the pooled one is still reported), or give "
                    "that client more test examples"
                )
