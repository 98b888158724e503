"""Dispatch: blocks of tasks given out to workers that may die, each of which keeps a partial sum.

Longest blocks go first, to whoever is free. A partial sum is fetched when there is nothing left to
do; a worker that is lost before that takes its sum with it, so all its blocks are done again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence

from atoll.aggregation.stage import Accumulator
from atoll.backends.backend import Result
from atoll.core.vectors import Vectors
from atoll.errors import RunError
from atoll.rounds.task import ClientTask, TaskResult

#: Losses in one group of tasks after which the run gives up: something kills every worker.
LOSSES = 10


class WorkerPool(ABC):
    """Workers by number, from 0."""

    @abstractmethod
    def send(self, worker: int, tasks: Sequence[ClientTask]) -> None:
        """Give a block to a worker; that it has died shows when it is awaited."""

    @abstractmethod
    def wait(self, workers: Sequence[int]) -> list[tuple[int, list[TaskResult] | None]]:
        """Wait for at least one of these; what came of its block, None if the worker is lost."""

    @abstractmethod
    def fetch(self, worker: int) -> Vectors | None:
        """The state of a worker's partial sum, which it forgets; None if the worker is lost."""

    @abstractmethod
    def replace(self, worker: int) -> str:
        """Put another in the place of a lost worker; what became of the old one, in words."""

    @abstractmethod
    def abandon(self, working: Sequence[int]) -> None:
        """Have every worker forget its sum; those `working` are in the middle of a block."""


def dispatch(
    pool: WorkerPool,
    workers: int,
    blocks: Sequence[list[int]],
    tasks: Sequence[ClientTask],
    sums: Accumulator,
) -> Generator[list[Result]]:
    """Have the pool run these blocks of places among `tasks`, and add everything to `sums`."""
    waiting = deque(blocks)
    done: list[list[list[int]]] = [[] for _ in range(workers)]
    busy: dict[int, list[int]] = {}
    losses = 0
    try:
        while waiting or busy or any(done):
            for worker in range(workers):
                if waiting and worker not in busy:
                    busy[worker] = waiting.popleft()
                    pool.send(worker, [tasks[place] for place in busy[worker]])
            lost = []
            if busy:
                for worker, results in pool.wait(sorted(busy)):
                    block = busy.pop(worker)
                    done[worker].append(block)
                    if results is None:
                        lost.append(worker)
                    else:
                        yield list(zip(block, results, strict=True))
            else:
                lost = [w for w in range(workers) if done[w] and not _collect(pool, w, sums, done)]
            for worker in lost:
                losses += 1
                fate = pool.replace(worker)
                if losses > LOSSES:
                    raise RunError(
                        f"{losses} workers were lost in one round, the last one {fate}; if memory "
                        "ran out, use fewer workers"
                    )
                waiting.extend(done[worker])
                done[worker] = []
    finally:
        if busy or any(done):
            pool.abandon(sorted(busy))


def _collect(pool: WorkerPool, worker: int, sums: Accumulator, done: list[list[list[int]]]) -> bool:
    """Merge a worker's partial sum; False if it is lost."""
    state = pool.fetch(worker)
    if state is None:
        return False
    partial = sums.fresh()
    partial.restore(state)
    sums.merge(partial)
    done[worker] = []
    return True
