"""Work: what any worker does with a block, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atoll.aggregation.stage import Sink
from atoll.backends.backend import LocalEngine, Method, blocks, step_aside
from atoll.backends.stacks import Delivery, Turn, one_by_one, together
from atoll.core.updates import Aggregate
from atoll.core.vectors import STATISTICS, Vector, Vectors
from atoll.data.federated import FederatedData
from atoll.errors import AtollError
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan

#: Steps of the comparison between a stack and its clients alone, and how many of them.
CHECKED_STEPS, CHECKED_CLIENTS = 3, 2


def run_block(
    method: Method,
    plan: Plan,
    data: FederatedData,
    received: Vectors,
    turns: Sequence[Turn],
    sums: Sink,
) -> list[Delivery]:
    """Run the turns of one block into `sums`."""
    if method == "stacked":
        return together(plan, data, received, turns, sums)
    return one_by_one(plan, data, received, turns, sums)


def grouped(
    engine: LocalEngine, plan: Plan, data: FederatedData, turns: Sequence[Turn]
) -> list[list[int]]:
    """Places of the turns in the engine's blocks, longest first."""
    return blocks([expected_work(plan, data, turn) for turn in turns], engine.block)


def expected_work(plan: Plan, data: FederatedData, turn: Turn) -> int:
    """Local steps of a turn."""
    planned = plan.learner.planned_steps(data.size(turn.member))
    return turn.assignment.steps(planned)


def checked(
    engine: LocalEngine,
    plan: Plan,
    data: FederatedData,
    received: Vectors,
    turns: Sequence[Turn],
    notes: list[str],
) -> LocalEngine:
    """The engine, or one without stacks where the algorithm's rules do not work on them."""
    reason = objection(plan, data, received, turns) if engine.method == "stacked" else ""
    if not reason:
        return engine
    notes.append(f"one client at a time instead of a stack: {reason}")
    aside, more = step_aside(engine.alone(), plan, data)
    notes += more
    return aside


def objection(plan: Plan, data: FederatedData, received: Vectors, turns: Sequence[Turn]) -> str:
    """Why this plan cannot be stacked, found by running a little of it both ways; or empty.

    Rules must keep the leading axis of a cohort. One that does not (a norm over everything, a
    branch on a number) is found here, and not in the results.
    """
    few = []
    for place, turn in enumerate(turns[:CHECKED_CLIENTS]):
        planned = plan.learner.planned_steps(data.size(turn.member))
        share = min(1.0, CHECKED_STEPS / planned) * turn.assignment.fraction
        assignment = replace(turn.assignment, fraction=share)
        memory = _disturbed(turn.memory, received["params"], place + 1)
        few.append(turn._replace(assignment=assignment, memory=memory))
    # What is zero at first would hide how a rule treats it.
    others = {n: v for n, v in received.items() if n != "params" and n not in STATISTICS}
    received = {**received, **_disturbed(others, received["params"], 0)}
    outcomes = []
    for run in (one_by_one, together):
        sums = plan.stages.open(plan.schema)
        try:
            deliveries = run(plan, data, received, few, sums)
        except Exception as error:
            if run is one_by_one:
                return ""  # the run itself will say so
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the algorithm's rules do not work on a stack of clients ({line})"
        if any(delivery.fault for delivery in deliveries):
            if run is one_by_one:
                return ""
            return "the updates of a stack of clients are refused, and those of each are not"
        try:
            outcomes.append((sums.close(len(data)), deliveries))
        except AtollError:
            return ""
    (alone, singly), (stack, jointly) = outcomes
    near = stacking(plan.learner).tolerance
    # A stage may encode a value that was rounded otherwise in a few bytes more.
    same = _alike(alone, stack, near) and all(
        abs(a.size - b.size) < 64 for a, b in zip(singly, jointly, strict=True)
    )
    for a, b in zip(singly, jointly, strict=True):
        same &= all(_close(a.memory[name], b.memory[name], near) for name in a.memory)
    return (
        ""
        if same
        else "the algorithm gives something else for a stack of clients than for each of them; "
        "write its rules with operators only"
    )


def _disturbed(vectors: Vectors, params: Vector, place: int) -> Vectors:
    """The vectors with noise as large as weights, other for each place; whole numbers stay."""
    rng = np.random.default_rng(place)
    scale = np.float32(0.5 * float(np.abs(params).mean()) + 1e-2)
    return {
        name: vector + scale * rng.standard_normal(vector.shape, dtype=np.float32)
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
