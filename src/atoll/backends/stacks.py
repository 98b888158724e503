"""A block of tasks: one client after the other, or all of them as one stack, into a running sum.

Both ways run the same algorithm: written with operators only, its lines serve one client's
arrays [P] and a stack's [C, P].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import WEIGHT_LEAST, WEIGHT_LIMIT
from atoll.aggregation.stage import Accumulator, Rows
from atoll.aggregation.sums import unit_scale
from atoll.aggregation.validate import validate_rows
from atoll.algorithms.client import Client, Holder
from atoll.core.updates import Update
from atoll.core.vectors import STATISTICS, Tree, Vectors, describe_names, nest
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.errors import ConfigurationError, RunError, UpdateRefused, no_exit
from atoll.learners.base import At, Correction, Learner, LocalResult, Objective, stacking
from atoll.rounds.driver import discounted
from atoll.rounds.messages import message_size
from atoll.rounds.plan import Plan
from atoll.rounds.task import (
    ClientTask,
    Received,
    TaskResult,
    check_names,
    conformed,
    in_learner,
    lent,
    remembered,
    run_task,
    sent,
)


@dataclass
class Stack(Client):
    """Several clients as an algorithm sees them: like one, with a leading axis in every array."""

    members: Sequence[Holder] = ()

    stacked: ClassVar[bool] = True

    @property
    def holders(self) -> list[Holder]:
        return list(self.members)

    @property
    def name(self) -> str:
        raise ConfigurationError("a stack of clients has no one name; use client.each(rule)")

    @property
    def examples(self) -> Examples:
        raise ConfigurationError("a stack of clients has no one data set; use client.each(rule)")

    def _loop(
        self,
        model: Vectors,
        holders: list[Holder],
        correction: Correction | At | None,
        objective: Objective | None,
    ) -> LocalResult:
        more = () if objective is None else (objective,)
        return stacking(self.learner).train_cohort(
            model,
            [holder.examples for holder in holders],
            [holder.assignment for holder in holders],
            correction,
            *more,
        )


def one_by_one(
    plan: Plan, data: FederatedData, received: Tree, tasks: Sequence[ClientTask], sums: Accumulator
) -> list[TaskResult]:
    """Each task as a real site would run it."""
    opened, results = Received.of(plan, received), []
    for task in tasks:
        message, state = run_task(plan, opened, task, data.train(task.member))
        results.append(_hand_in(plan, message, state, opened, sums, task))
    return results


def together(
    plan: Plan, data: FederatedData, received: Tree, tasks: Sequence[ClientTask], sums: Accumulator
) -> list[TaskResult]:
    """All tasks at once, where learner and algorithm can."""
    opened, learner = Received.of(plan, received), plan.learner
    stack = _stacked(plan, data, opened, tasks)
    got = in_learner(learner, {**opened.algorithm, **opened.given})
    mine = _memories([task.state.get("algorithm", {}) for task in tasks])
    remembered = in_learner(learner, mine)
    with lent(got, remembered), no_exit("the clients' training"):
        update, kept = plan.algorithm.work(stack, got, remembered)
    states = _states(plan, kept, stack, tasks)
    if update.shares or not plan.stages.transparent:
        return _each(plan, update, stack, opened, tasks, states, sums)
    rows = _rows(plan, update, stack, opened, tasks, sums)
    faults = validate_rows(
        rows.vectors, rows.statistics, rows.weights, rows.metrics, plan.stages.gathers,
        finite=rows.folds or (),
    )  # fmt: skip
    if rows.folds is not None and any(faults):
        # The sum is of all of them: look at each by itself.
        rows = _rows(plan, update, stack, opened, tasks, None)
        faults = validate_rows(
            rows.vectors, rows.statistics, rows.weights, rows.metrics, plan.stages.gathers
        )
    passed = [c for c, fault in enumerate(faults) if not fault]
    if passed:
        sums.add_rows(rows.chosen(passed))
    # No size depends on a value, so all are as large.
    size = message_size(rows.update(0))
    return [TaskResult(f, size, s) for f, s in zip(faults, states, strict=True)]


def _stacked(
    plan: Plan, data: FederatedData, received: Received, tasks: Sequence[ClientTask]
) -> Stack:
    """The stack before its work."""
    members = [Holder(task.client, data.train(task.member), task.assignment) for task in tasks]
    private = _memories([task.state.get("private", {}) for task in tasks])
    return Stack(
        plan.learner,
        received.statistics,
        plan.split,
        members[0],
        private,
        plan.public,
        members=members,
    )


def _memories(states: Sequence[Vectors]) -> Vectors:
    """What each of C clients keeps, as [C, ...]; all must keep the same."""
    for state in states:
        if state.keys() != states[0].keys():
            raise RunError(
                f"one client remembers {describe_names(state)} and another "
                f"{describe_names(states[0])}; `remember` must name all of it"
            )
    return {name: np.stack([state[name] for state in states]) for name in states[0]}


def _states(
    plan: Plan, kept: dict[str, Any], stack: Stack, tasks: Sequence[ClientTask]
) -> list[Tree]:
    """Each client's new state; what it keeps of stages and questions is as it was."""
    clients = len(tasks)
    rows: dict[str, NDArray[Any]] = {}
    for name, value, spec in remembered(kept, tasks[0].state):
        rows[f"algorithm/{name}"] = conformed(plan.learner, name, value, spec, "memory", clients)
    for section, value in stack.private.items():
        spread = value if value.ndim == 2 else np.broadcast_to(value, (clients, len(value)))
        rows[f"private/{section}"] = spread
    return [
        {
            **nest({name: row[c].copy() for name, row in rows.items()}),
            **{name: task.state[name] for name in ("stages", "kept") if name in task.state},
        }
        for c, task in enumerate(tasks)
    ]


def _rows(
    plan: Plan,
    update: Update,
    stack: Stack,
    received: Received,
    tasks: Sequence[ClientTask],
    sums: Accumulator | None,
) -> Rows:
    """The updates as rows, discounted; folded where they are, if `sums` takes that."""
    learner, clients = plan.learner, len(tasks)
    check_names(update, plan)
    discounts = np.array([[task.discount] for task in tasks], np.float32)
    if (discounts != 1).any():
        factors = learner.asarray(discounts)
        update = replace(update, vectors={n: factors * v for n, v in update.vectors.items()})
    weights = _numbers(update.weight, clients, plan.learner)
    folds = None if sums is None or not sums.takes_folds else _folds(plan, update, weights)
    vectors: Vectors
    if folds is None:
        vectors = {
            name: conformed(learner, name, update.vectors[name], spec, "update", clients)
            for name, spec in plan.schema.vectors.items()
        }
    else:
        # The vectors never leave the learner's device; what stands for them has their size only.
        vectors = {
            name: np.broadcast_to(np.float32(0), (clients, *spec.shape))
            for name, spec in plan.schema.vectors.items()
        }
    return Rows(
        vectors,
        _statistics(plan, stack, received, clients),
        weights,
        _columns(plan, update, clients),
        [task.sender for task in tasks],
        folds,
    )


def _folds(
    plan: Plan, update: Update, weights: list[float]
) -> dict[str, tuple[NDArray[np.int64], int]] | None:
    """The updates' weighted sums, if they can be made where the learner's arrays are."""
    if not all(WEIGHT_LEAST <= weight <= WEIGHT_LIMIT for weight in weights):
        return None  # validation has a sentence for it
    scales = [unit_scale(weight) for weight in weights]
    folds = {}
    for name, spec in plan.schema.vectors.items():
        rows = update.vectors[name]
        whole = spec.dtype == "float32" and rows.shape == (len(weights), *spec.shape)
        plain = whole and len(spec.shape) == 1
        fold = stacking(plan.learner).fold(rows, scales) if plain else None
        if fold is None:
            return None
        folds[name] = fold
    return folds


def _each(
    plan: Plan,
    update: Update,
    stack: Stack,
    received: Received,
    tasks: Sequence[ClientTask],
    states: list[Tree],
    sums: Accumulator,
) -> list[TaskResult]:
    """The updates of a stack one after the other, through the stages of the pipeline."""
    learner, clients = plan.learner, len(tasks)
    shares = {name: _numbers(value, clients, plan.learner) for name, value in update.shares.items()}
    never = {name for name, column in shares.items() if not any(column)}
    check_names(update, plan, never)
    vectors = {
        name: conformed(learner, name, update.vectors[name], spec, "update", clients)
        for name, spec in plan.schema.vectors.items()
        if name not in never
    }
    statistics = _statistics(plan, stack, received, clients)
    weights, columns = (
        _numbers(update.weight, clients, plan.learner),
        _columns(plan, update, clients),
    )
    results = []
    for c, task in enumerate(tasks):
        held = {name: column[c] for name, column in shares.items()}
        own = Update(
            {name: rows[c] for name, rows in vectors.items() if held.get(name, 1) != 0},
            weights[c],
            {name: rows[c] for name, rows in statistics.items()},
            {name: column[c] for name, column in columns.items()},
            held,
        )
        message, state = sent(plan, own, received, task, states[c])
        results.append(_hand_in(plan, message, state, received, sums, task))
    return results


def _hand_in(
    plan: Plan,
    message: Update,
    state: Tree,
    received: Received,
    sums: Accumulator,
    task: ClientTask,
) -> TaskResult:
    """Take a message into the sum, or say why it is refused."""
    size = message_size(message)
    try:
        update = plan.stages.decode(message, received.stages)
    except UpdateRefused as refusal:
        return TaskResult(str(refusal), size, state)
    sums.add(discounted(update, task.discount), task.sender)
    return TaskResult("", size, state)


def _statistics(plan: Plan, stack: Stack, received: Received, clients: int) -> Vectors:
    """What each client's work changed in the shared buffers and counters, [C, ...]."""
    return {
        str(name): stack.statistics.get(
            name,
            np.zeros((clients, len(received.statistics[name])), received.statistics[name].dtype),
        )
        for name in STATISTICS
        if name in plan.schema.statistics
    }


def _columns(plan: Plan, update: Update, clients: int) -> dict[str, list[float]]:
    """Each client's own metrics, as far as they may leave it."""
    known = plan.stages.gathers.metrics
    return {
        name: _numbers(value, clients, plan.learner)
        for name, value in update.metrics.items()
        if name in known
    }


def _numbers(value: Any, clients: int, learner: Learner) -> list[float]:
    """One Python number for each client."""
    plain = value if isinstance(value, int | float | np.ndarray) else learner.asnumpy(value)
    array = np.asarray(plain, np.float64).reshape(-1)
    if len(array) not in (1, clients):
        raise RunError(f"the algorithm gives {len(array)} weights or metrics for {clients} clients")
    numbers: list[float] = np.broadcast_to(array, clients).tolist()
    return numbers
