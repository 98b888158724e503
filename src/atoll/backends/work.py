"""Work: what any worker does with a block, wherever it runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np

from atoll.aggregation.stage import Accumulator
from atoll.backends.backend import Arrangement, Backend, Method, Result, blocks, step_aside
from atoll.backends.stacks import one_by_one, together
from atoll.core.random import Key
from atoll.core.updates import Aggregate
from atoll.core.vectors import Tree, Vector, Vectors, flatten
from atoll.data.federated import FederatedData
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan
from atoll.rounds.task import ClientTask, Received, TaskResult

#: Steps of the comparison between a stack and its clients alone, and how many of them.
CHECKED_STEPS, CHECKED_CLIENTS = 3, 2


def run_block(
    method: Method,
    plan: Plan,
    data: FederatedData,
    received: Tree,
    tasks: Sequence[ClientTask],
    sums: Accumulator,
) -> list[TaskResult]:
    """Run the tasks of one block into `sums`."""
    if method == "stacked":
        return together(plan, data, received, tasks, sums)
    return one_by_one(plan, data, received, tasks, sums)


def grouped(
    engine: Arrangement, plan: Plan, data: FederatedData, tasks: Sequence[ClientTask]
) -> list[list[int]]:
    """Places of the tasks in the engine's blocks, longest first."""
    return blocks([expected_work(plan, data, task) for task in tasks], engine.block)


def expected_work(plan: Plan, data: FederatedData, task: ClientTask) -> int:
    """Local steps of a task."""
    planned = plan.learner.planned_steps(data.size(task.member))
    return task.assignment.steps(planned)


class Workers(Backend):
    """A backend of workers that are alike: what threads, processes and Ray's actors share.

    Before the first block it is seen whether the algorithm's rules work on stacks at all.
    """

    engine: Arrangement

    def __init__(
        self, engine: Arrangement, plan: Plan, data: FederatedData, key: Key, notes: list[str]
    ) -> None:
        self.engine, self.notes = engine, notes
        self._plan, self._data, self._key = plan, data, key
        self._checked = False

    def run(
        self, received: Tree, tasks: Sequence[ClientTask], sums: Accumulator
    ) -> Generator[list[Result]]:
        if not self._checked:
            self._check(received, tasks)
            # One row alone cannot show that rules mix rows.
            self._checked = len(tasks) > 1
        groups = grouped(self.engine, self._plan, self._data, tasks)
        return self._run(received, tasks, groups, sums)

    @abstractmethod
    def _run(
        self,
        received: Tree,
        tasks: Sequence[ClientTask],
        groups: list[list[int]],
        sums: Accumulator,
    ) -> Generator[list[Result]]:
        """Run these groups of places among `tasks`."""

    def _check(self, received: Tree, tasks: Sequence[ClientTask]) -> None:
        """Go on without stacks where the algorithm's rules do not work on them."""
        if self.engine.method != "stacked":
            return
        reason = objection(self._plan, self._data, received, tasks)
        if reason:
            self.notes.append(f"one client at a time instead of a stack: {reason}")
            self.engine, more = step_aside(self.engine.alone(), self._plan, self._data)
            self.notes += more


def objection(plan: Plan, data: FederatedData, received: Tree, tasks: Sequence[ClientTask]) -> str:
    """Why this plan cannot be stacked, found by running a little of it both ways; or empty.

    Rules must keep the leading axis of a stack. One that does not (a norm over everything, a
    branch on a number) is found here, and not in the results. Stages see one row after the other
    either way, and may turn a rounding into much: so what is compared is the algorithm without.
    """
    plain = _without_stages(plan)
    opened = Received.of(plan, received)
    size = opened.algorithm.get("params", np.ones(1, np.float32))
    few = []
    for place, task in enumerate(tasks[:CHECKED_CLIENTS]):
        planned = plan.learner.planned_steps(data.size(task.member))
        share = min(1.0, CHECKED_STEPS / planned) * task.assignment.fraction
        assignment = replace(task.assignment, fraction=share)
        memory = _disturbed(task.state.get("algorithm", {}), size, place + 1)
        own = {"algorithm": memory, "private": task.state.get("private", {})}
        few.append(task._replace(assignment=assignment, state=own))
    # What is zero at first would hide how a rule treats it.
    others = {name: v for name, v in opened.algorithm.items() if name != "params"}
    tree = {
        "algorithm": {**opened.algorithm, **_disturbed(others, size, 0)},
        "statistics": opened.statistics,
        "question": {"given": opened.given},
    }
    outcomes = []
    for run in (one_by_one, together):
        sums = plain.stages.open()
        try:
            results = run(plain, data, tree, few, sums)
        except Exception as error:
            if run is one_by_one:
                return ""  # the run itself will say so
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the algorithm's rules do not work on a stack of clients ({line})"
        if any(result.fault for result in results):
            if run is one_by_one:
                return ""
            return "the updates of a stack of clients are refused, and those of each are not"
        outcomes.append((plain.stages.close(sums, len(data), {}, Key(0)), results))
    (alone, singly), (stack, jointly) = outcomes
    near = stacking(plan.learner).tolerance
    same = _alike(alone, stack, near)
    for a, b in zip(singly, jointly, strict=True):
        one, other = flatten(a.state), flatten(b.state)
        same &= one.keys() == other.keys()
        same &= all(_close(one[name], other[name], near) for name in one if name in other)
    return (
        ""
        if same
        else "the algorithm gives something else for a stack of clients than for each of them; "
        "write its rules with operators only"
    )


def _without_stages(plan: Plan) -> Plan:
    """The same algorithm under a plain mean."""
    return Plan(
        learner=plan.learner, algorithm=plan.algorithm, schedule=plan.schedule,
        private=plan.private, public=plan.public,
    )  # fmt: skip


def _disturbed(vectors: Vectors, params: Vector, place: int) -> Vectors:
    """The vectors with noise as large as weights, other for each place; whole numbers stay."""
    rng = np.random.default_rng(place)
    scale = np.float32(0.5 * float(np.abs(params).mean()) + 1e-2)
    return {
        name: np.asarray(vector + scale * rng.standard_normal(vector.shape, dtype=np.float32))
        if vector.dtype == np.float32
        else vector
        for name, vector in vectors.items()
    }


def _alike(a: Aggregate, b: Aggregate, near: float) -> bool:
    names = set(a.vectors) == set(b.vectors) and set(a.measurements) == set(b.measurements)
    return (
        names
        and abs(a.weight - b.weight) <= near * abs(a.weight)
        and all(_close(a.vectors[name], b.vectors[name], near) for name in a.vectors)
        and all(
            abs(value - b.measurements[name]) <= near * max(1.0, abs(value))
            for name, value in a.measurements.items()
        )
    )


def _close(a: object, b: object, near: float) -> bool:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        return False
    scale = float(np.sqrt(np.square(x).sum())) + 1e-9
    return float(np.sqrt(np.square(x - y).sum())) <= near * scale
