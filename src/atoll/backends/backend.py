"""Engines: how the tasks of a cohort are run. The algorithm never knows which one it is.

An engine is a description; opened over a plan and its data it becomes a backend, which takes tasks
in blocks. What is in a block never depends on how many workers there are, and sums are exact, so
the number of workers, the order in which they finish and their deaths change no byte.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

from atoll.aggregation.stage import Accumulator
from atoll.core.numbers import whole
from atoll.core.random import Key
from atoll.core.vectors import Tree
from atoll.data.federated import FederatedData
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan
from atoll.rounds.task import ClientTask, TaskResult

Method = Literal["sequential", "stacked"]
#: A place among the tasks that were asked for, and what came of that task.
Result = tuple[int, TaskResult]


class Backend(ABC):
    """An engine at work on one run; used as a context, it cleans up after itself."""

    #: The engine as it turned out: every choice made.
    engine: Any
    #: Why the engine is not quite what was asked for, in sentences.
    notes: list[str]

    @abstractmethod
    def run(
        self, received: Tree, tasks: Sequence[ClientTask], sums: Accumulator
    ) -> Generator[list[Result]]:
        """Run tasks, block by block in any order, and add their updates to `sums`.

        Sums are complete when the iterator is at its end; it may be closed before.
        """

    def close(self) -> None:
        """Let workers go."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Engine(ABC):
    """How tasks are run."""

    @abstractmethod
    def open(self, plan: Plan, data: FederatedData, key: Key) -> Backend:
        """A backend for a run of this plan over these data with this seed."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How the tasks of a cohort are laid out over workers.

    Args:
        method: "sequential" takes one client after the other, "stacked" a block of them at once.
        block: clients in a block.
        workers: how many blocks are run at the same time.
        processes: whether workers are processes that share memory, or threads of this one.
        threads: threads within one operation of the learner's framework.
    """

    method: Method
    block: int
    workers: int
    processes: bool
    threads: int

    def __post_init__(self) -> None:
        for name in ("block", "workers", "threads"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))

    def alone(self) -> Self:
        """The same cores for one client at a time: as workers, not within an operation."""
        workers = self.workers * self.threads
        return replace(self, method="sequential", block=1, workers=workers, threads=1)

    def __str__(self) -> str:
        kind = "processes" if self.processes else "workers"
        block = f"block={self.block}, " if self.method == "stacked" else ""
        return f"{self.method}({block}{kind}={self.workers}, threads={self.threads})"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


A = TypeVar("A", bound=Arrangement)


def step_aside(engine: A, plan: Plan, data: FederatedData) -> tuple[A, list[str]]:
    """The engine with what plan and platform do not allow taken back, and why."""
    notes = []
    learner, examples = plan.learner, data.train(0)
    if engine.method == "stacked":
        reason = stacking(learner).stacks(examples)
        if reason:
            notes.append(f"one client at a time instead of a stack: {reason}")
            engine = engine.alone()
    if engine.processes and not hasattr(os, "fork"):
        notes.append("threads instead of processes: this platform cannot fork")
        engine = replace(engine, processes=False)
    if engine.processes and not stacking(learner).forks_safely:
        notes.append(
            "threads instead of processes: the learner's framework cannot be used after a fork"
        )
        engine = replace(engine, processes=False)
    if engine.processes and engine.threads > 1:
        notes.append(
            "one thread in each process: the thread pools of numerical libraries do not survive a "
            "fork"
        )
        engine = replace(engine, threads=1)
    if (
        engine.workers > 1
        and not engine.processes
        and not stacking(learner).threads_safely(examples)
    ):
        notes.append(
            "one worker instead of several threads: the learner keeps its model, or draws random "
            "numbers, in one place for the whole process; use processes"
        )
        engine = replace(engine, workers=1)
    return engine, notes


def blocks(work: Sequence[int], size: int) -> list[list[int]]:
    """Places in blocks of `size`, longest first; clients of like work share a block."""
    order = sorted(range(len(work)), key=lambda place: (-work[place], place))
    return [order[start : start + size] for start in range(0, len(order), size)]
