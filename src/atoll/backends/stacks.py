"""A cohort's turns: one client after the other, or all of them as one stack, into a running sum.

Both ways run the same algorithm: written with operators only, its lines serve one client's
vectors [P] and a cohort's [C, P].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Sink
from atoll.aggregation.sums import unit_scale
from atoll.aggregation.validate import WEIGHT_LEAST, WEIGHT_LIMIT, admit, validate_rows
from atoll.algorithms.client import Client
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import STATISTICS, Array, Vectors, part, prefixed
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.errors import RunError, UpdateRefused
from atoll.learners.base import Assignment, Correction, LocalResult, stacking
from atoll.rounds.messages import message_size
from atoll.rounds.plan import Plan
from atoll.rounds.server import STAGE
from atoll.rounds.task import MEMORY, assignment_for, run_task


class Turn(NamedTuple):
    """One client's turn to be run: a member of the population, its memory and its assignment.

    `number` is what its draws are keyed by; its update is multiplied by `discount`.
    """

    member: int
    client: str
    assignment: Assignment
    memory: Vectors
    number: int = 0
    discount: float = 1.0

    def row(self) -> list[Any]:
        """The turn without its memory, ready for JSON, for `read` elsewhere."""
        about = self.assignment
        return [
            self.member, self.client, about.round, self.number, about.fraction, self.discount
        ]  # fmt: skip

    @staticmethod
    def read(row: Sequence[Any], key: Key, memory: Vectors) -> Turn:
        """The turn that `row` tells, in a run with this key."""
        member, client, round, number, fraction, discount = row
        assignment = assignment_for(key, client, round, number, fraction)
        return Turn(member, client, assignment, memory, number, discount)


class Delivery(NamedTuple):
    """What came of a turn, apart from what went into the sum.

    `fault` says why the update was refused, if it was; `size` is its message in bytes; `memory` is
    what the client remembers if the update is accepted.
    """

    fault: str
    size: int
    memory: Vectors


@dataclass
class Cohort(Client):
    """Several clients as an algorithm sees them: like one, with a leading axis in every array."""

    members: Sequence[Examples] = ()
    assignments: Sequence[Assignment] = ()
    statistics: Vectors = field(default_factory=dict)

    @property
    def count(self) -> Any:
        return np.array([len(examples) for examples in self.members])

    def train(self, params: Array, correction: Correction | None = None) -> LocalResult:
        local = stacking(self.learner).train_cohort(
            self._at(params), self.members, self.assignments, correction
        )
        self._keep(local.statistics)
        return local

    def gradient(self, params: Array, *, keep_statistics: bool = False) -> Array:
        model = self._at(params)
        rows, statistics = [], []
        for c, (examples, assignment) in enumerate(
            zip(self.members, self.assignments, strict=True)
        ):
            own = model if model["params"].ndim == 1 else {**model, "params": model["params"][c]}
            gradient, after = self.learner.gradient(own, examples, assignment.key)
            rows.append(np.array(self.learner.asnumpy(gradient)))
            statistics.append(after)
        if keep_statistics:
            self._keep({s: np.stack([each[s] for each in statistics]) for s in statistics[0]})
        return self.learner.asarray(np.stack(rows))


def one_by_one(
    plan: Plan, data: FederatedData, received: Vectors, turns: Sequence[Turn], sums: Sink
) -> list[Delivery]:
    """Each turn as a real site would run it."""
    deliveries = []
    for turn in turns:
        examples = data.train(turn.member)
        message, memory = run_task(plan, received, turn.memory, examples, turn.assignment)
        deliveries.append(_hand_in(plan, message, memory, sums, turn.discount))
    return deliveries


def together(
    plan: Plan, data: FederatedData, received: Vectors, turns: Sequence[Turn], sums: Sink
) -> list[Delivery]:
    """All turns at once, where learner and algorithm can."""
    learner, clients = plan.learner, len(turns)
    model: Vectors = {n: received[n] for n in ("params", *STATISTICS) if n in received}
    got = {
        name: learner.asarray(vector)
        for name, vector in received.items()
        if not name.startswith(STAGE) and name not in STATISTICS
    }
    mine = {
        name.removeprefix(MEMORY): learner.asarray(np.stack([turn.memory[name] for turn in turns]))
        for name in turns[0].memory
        if name.startswith(MEMORY)
    }
    cohort = Cohort(
        learner,
        Examples(np.empty(0), np.empty(0)),
        model,
        turns[0].assignment,
        members=[data.train(turn.member) for turn in turns],
        assignments=[turn.assignment for turn in turns],
    )
    update, kept = plan.algorithm.work(cohort, got, mine)
    discounts = np.array([[turn.discount] for turn in turns], np.float32)
    if plan.stages.transparent and (discounts != 1).any():
        factors = learner.asarray(discounts)
        update = replace(update, vectors={n: factors * v for n, v in update.vectors.items()})
    weights = _numbers(update.weight, clients)
    memories = {MEMORY + n: _rows(learner.asnumpy(v), clients, n) for n, v in kept.items()}
    statistics: Vectors = {
        str(name): cohort.statistics.get(
            name, np.zeros((clients, len(model[name])), model[name].dtype)
        )
        for name in STATISTICS
        if name in model
    }
    columns = {name: _numbers(value, clients) for name, value in update.metrics.items()}
    folds = _folds(plan, update, weights, sums)
    if folds is not None:
        # The vectors never leave the learner's device; what stands for them has their size only.
        nothing = {n: np.broadcast_to(np.float32(0), v.shape) for n, v in update.vectors.items()}
        faults = validate_rows(nothing, statistics, weights, plan.schema, finite=folds)
        if not any(faults):
            sums.add_folds(folds, statistics, weights, columns)
            return _deliveries(faults, nothing, statistics, weights, columns, memories)
    vectors = {n: _rows(learner.asnumpy(v), clients, n) for n, v in update.vectors.items()}
    if plan.stages.transparent:
        faults = validate_rows(vectors, statistics, weights, plan.schema)
        sums.add_rows(vectors, statistics, weights, columns, [not fault for fault in faults])
        return _deliveries(faults, vectors, statistics, weights, columns, memories)
    metrics = _transposed(columns, clients)
    deliveries = []
    told = part(STAGE, received)
    for c, turn in enumerate(turns):
        own = Update(
            {name: rows[c] for name, rows in vectors.items()},
            weights[c],
            {name: rows[c] for name, rows in statistics.items()},
            metrics[c],
        )
        message, stages = plan.stages.encode(
            own, told, part(STAGE, turn.memory), turn.assignment.key.fold("encode")
        )
        memory = {name: rows[c].copy() for name, rows in memories.items()} | prefixed(STAGE, stages)
        deliveries.append(_hand_in(plan, message, memory, sums, turn.discount))
    return deliveries


def _folds(
    plan: Plan, update: Update, weights: list[float], sums: Sink
) -> dict[str, tuple[NDArray[Any], int]] | None:
    """The updates' weighted sums, if they can be made where the learner's arrays are."""
    if not (plan.stages.transparent and sums.takes_folds):
        return None
    if not all(WEIGHT_LEAST <= weight <= WEIGHT_LIMIT for weight in weights):
        return None  # the door has a sentence for it
    scales = [unit_scale(weight) for weight in weights]
    folds = {}
    for name, rows in update.vectors.items():
        whole = rows.ndim == 2 and len(rows) == len(weights)
        fold = stacking(plan.learner).fold(rows, scales) if whole else None
        if fold is None:
            return None
        folds[name] = fold
    return folds


def _deliveries(
    faults: list[str],
    vectors: Vectors,
    statistics: Vectors,
    weights: list[float],
    columns: dict[str, list[float]],
    memories: Vectors,
) -> list[Delivery]:
    """What came of each turn of a stack; no size depends on a value, so all are as large."""
    first = {name: rows[0] for name, rows in {**vectors, **statistics}.items()}
    size = message_size(Update(first, weights[0], metrics=dict.fromkeys(columns, 0.0)))
    return [
        Delivery(fault, size, {name: rows[c].copy() for name, rows in memories.items()})
        for c, fault in enumerate(faults)
    ]


def discounted(update: Update, discount: float) -> Update:
    """The update with its vectors multiplied by the discount of a stale one."""
    if discount == 1:
        return update
    factor = np.float32(discount)
    return replace(update, vectors={n: factor * vector for n, vector in update.vectors.items()})


def _hand_in(plan: Plan, message: Update, memory: Vectors, sums: Sink, discount: float) -> Delivery:
    """Take a message into the sum, or say why it is refused."""
    size = message_size(message)
    try:
        update = plan.stages.decode(message, plan.schema)
        admit(update, plan.schema)
    except UpdateRefused as refusal:
        return Delivery(str(refusal), size, memory)
    sums.add(discounted(update, discount))
    return Delivery("", size, memory)


def _rows(vectors: NDArray[Any], clients: int, name: str) -> NDArray[np.float32]:
    """[C, P] float32; one vector that is the same for all is repeated."""
    if vectors.ndim not in (1, 2) or (vectors.ndim == 2 and len(vectors) != clients):
        raise RunError(
            f"the algorithm's {name!r} has shape {list(vectors.shape)} for {clients} clients; "
            "write its rules with operators only, so that they keep the leading axis of a cohort"
        )
    rows = np.broadcast_to(vectors, (clients, vectors.shape[-1]))
    return np.asarray(rows, np.float32)


def _transposed(columns: dict[str, list[float]], clients: int) -> list[dict[str, float]]:
    """Each client's own metrics."""
    if not columns:
        return [{}] * clients
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _numbers(value: Any, clients: int) -> list[float]:
    """One Python number for each client."""
    array = np.asarray(value, np.float64).reshape(-1)
    if len(array) not in (1, clients):
        raise RunError(f"the algorithm gives {len(array)} weights or metrics for {clients} clients")
    numbers: list[float] = np.broadcast_to(array, clients).tolist()
    return numbers
