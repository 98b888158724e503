"""A client's turn: from what it received and remembers to its message and new memory.

The simulator and a real site run this same function.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from atoll.algorithms.client import Client
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import STATISTICS, Vectors, part, prefixed
from atoll.data.examples import Examples
from atoll.learners.base import Assignment
from atoll.rounds.plan import Plan
from atoll.rounds.server import STAGE

MEMORY = "algorithm/"


def assignment_for(
    seed_key: Key, client: str, round: int, turn: int, fraction: float
) -> Assignment:
    """The assignment of a client in a round; its draws are those of its turn."""
    return Assignment(round, seed_key.fold("work", turn, client), fraction)


def first_state(plan: Plan, received: Vectors) -> Vectors:
    """What a client remembers before its first turn."""
    mine = plan.algorithm.remember(received["params"])
    stages = plan.stages.remember(plan.schema)
    return {
        **prefixed(MEMORY, mine),
        **prefixed(STAGE, stages),
    }


def run_task(
    plan: Plan,
    received: Vectors,
    memory: Vectors,
    examples: Examples,
    assignment: Assignment,
) -> tuple[Update, Vectors]:
    """One client's work and the client half of the pipeline.

    Neither `received` nor `memory` is changed; the message shares no array with them.
    """
    learner = plan.learner
    model: Vectors = {n: received[n] for n in ("params", *STATISTICS) if n in received}
    got = {
        name: learner.asarray(vector)
        for name, vector in received.items()
        if not name.startswith(STAGE) and name not in STATISTICS
    }
    mine = {name: learner.asarray(vector) for name, vector in part(MEMORY, memory).items()}
    client = Client(learner, examples, model, assignment)
    update, kept = plan.algorithm.work(client, got, mine)
    message = replace(
        update,
        vectors={
            name: np.asarray(learner.asnumpy(vector), np.float32)
            for name, vector in update.vectors.items()
        },
        statistics={
            name: client.statistics.get(name, np.zeros_like(model[name]))
            for name in STATISTICS
            if name in model
        },
        weight=float(update.weight),
        metrics={name: float(value) for name, value in update.metrics.items()},
    )
    message, stages = plan.stages.encode(
        message, part(STAGE, received), part(STAGE, memory), assignment.key.fold("encode")
    )
    return message, {
        **{MEMORY + name: learner.asnumpy(vector) for name, vector in kept.items()},
        **prefixed(STAGE, stages),
    }
