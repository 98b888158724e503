"""Baselines: the same learner trained centrally, and by each client alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from atoll.core.random import Key
from atoll.core.vectors import Vectors
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.learners.base import Assignment, Learner
from atoll.rounds.evaluate import evaluate_clients, evaluate_pooled
from atoll.rounds.plan import Plan


@dataclass(frozen=True)
class Baseline:
    """One way to train without a federation.

    `pooled` are metrics on the global test part; `own` are metrics on clients' own test parts,
    averaged over clients. For local training both are means over the clients' models.
    """

    pooled: dict[str, float]
    own: dict[str, float]
    rounds: int


@dataclass(frozen=True)
class Baselines:
    """What everybody's data in one place, and each client's data alone, would have given."""

    central: Baseline
    local: Baseline


def train_baselines(
    plan: Plan, data: FederatedData, seed: int, central_rounds: int | None, local_rounds: int | None
) -> Baselines:
    """Train both baselines; see `Federation.baselines`."""
    learner = plan.learner
    learner.check(data)
    metrics = tuple(dict.fromkeys(("loss", data.task.main)))
    cohort = plan.schedule.needed(len(data))
    spent = max(1, round(plan.schedule.rounds * cohort / len(data)))
    central_rounds = central_rounds or spent
    local_rounds = local_rounds or plan.schedule.rounds
    key = Key(seed)
    start = learner.init(key.fold("init"))

    central = _train(learner, start, data.all_train(), central_rounds, key.fold("central"))
    own = evaluate_clients(learner, central, data, metrics)
    pooled_local, own_local = [], []
    for client in range(len(data)):
        model = _train(
            learner, start, data.train(client), local_rounds, key.fold("local", data.names[client])
        )
        pooled_local.append(evaluate_pooled(learner, model, data))
        test = data.test(client)
        if len(test):
            own_local.append(
                learner.figures(learner.evaluate(model, test, data.task, data.classes), data.task)
            )
    return Baselines(
        Baseline(
            evaluate_pooled(learner, central, data),
            {name: _mean(list(own.values[name])) for name in metrics if len(data.tested())},
            central_rounds,
        ),
        Baseline(_means(pooled_local), _means(own_local), local_rounds),
    )


def _train(learner: Learner, start: Vectors, examples: Examples, rounds: int, key: Key) -> Vectors:
    model = start
    for number in range(1, rounds + 1):
        local = learner.train(model, examples, Assignment(number, key.fold("work", number)))
        model = {"params": learner.asnumpy(local.params), **local.statistics}
    return model


def _means(figures: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: _mean([each[name] for each in figures if name in each]) for name in names}


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
