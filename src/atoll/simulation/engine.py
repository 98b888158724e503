"""Engines: how the turns of a cohort are run. The algorithm never knows which one it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from atoll.data.examples import Examples
from atoll.learners.base import Assignment
from atoll.rounds.plan import Plan
from atoll.rounds.turn import take_turn
from atoll.updates import Update
from atoll.vectors import Vectors


@dataclass(frozen=True, slots=True)
class Turn:
    """One client's turn to be run."""

    client: str
    examples: Examples
    memory: Vectors
    assignment: Assignment


class Engine(Protocol):
    """Runs turns; the results come in the order of the turns, one by one."""

    def run(
        self, plan: Plan, received: Vectors, turns: Iterable[Turn]
    ) -> Iterator[tuple[Update, Vectors]]:
        """The message and the new memory of each turn."""


@dataclass(frozen=True)
class Sequential:
    """One client after the other in this process, on the learner's resident buffers."""

    def run(
        self, plan: Plan, received: Vectors, turns: Iterable[Turn]
    ) -> Iterator[tuple[Update, Vectors]]:
        for turn in turns:
            yield take_turn(plan, received, turn.memory, turn.examples, turn.assignment)
