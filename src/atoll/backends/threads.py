"""Threads: blocks in this process, one after the other or several at the same time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Lock, local

from atoll.aggregation.stage import Accumulator, Rows
from atoll.backends.backend import Arrangement, Result
from atoll.backends.work import Workers, run_block
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Sender, Update
from atoll.core.vectors import Tree, Vectors
from atoll.data.federated import FederatedData
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan
from atoll.rounds.task import ClientTask


class Threads(Workers):
    """One worker in the calling thread, or several in a pool; frameworks release Python's lock."""

    def __init__(
        self, engine: Arrangement, plan: Plan, data: FederatedData, key: Key, notes: list[str]
    ) -> None:
        super().__init__(engine, plan, data, key, notes)
        self._pool: ThreadPoolExecutor | None = None
        self._ready = local()
        self._before = stacking(plan.learner).use_threads(engine.threads)

    def _check(self, received: Tree, tasks: Sequence[ClientTask]) -> None:
        super()._check(received, tasks)
        stacking(self._plan.learner).use_threads(self.engine.threads)
        if self.engine.workers > 1:
            self._pool = ThreadPoolExecutor(self.engine.workers, "atoll")

    def _run(
        self,
        received: Tree,
        tasks: Sequence[ClientTask],
        groups: list[list[int]],
        sums: Accumulator,
    ) -> Generator[list[Result]]:
        if self._pool is None or len(groups) == 1:
            for group in groups:
                yield self._block(received, tasks, group, sums)
            return
        guarded = _Guarded(sums)
        pending: set[Future[list[Result]]] = {
            self._pool.submit(self._block, received, tasks, group, guarded) for group in groups
        }
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        stacking(self._plan.learner).use_threads(self._before)

    def _block(
        self, received: Tree, tasks: Sequence[ClientTask], group: Sequence[int], sums: Accumulator
    ) -> list[Result]:
        if not hasattr(self._ready, "threads"):
            # Frameworks keep this count by thread.
            stacking(self._plan.learner).use_threads(self.engine.threads)
            self._ready.threads = True
        chosen = [tasks[place] for place in group]
        found = run_block(self.engine.method, self._plan, self._data, received, chosen, sums)
        return list(zip(group, found, strict=True))


class _Guarded(Accumulator):
    """A sum that several threads add to."""

    def __init__(self, sums: Accumulator) -> None:
        self._sums, self._lock = sums, Lock()
        self.takes_folds = sums.takes_folds  # type: ignore[misc]

    def add(self, update: Update, sender: Sender) -> None:
        with self._lock:
            self._sums.add(update, sender)

    def add_rows(self, rows: Rows) -> None:
        with self._lock:
            self._sums.add_rows(rows)

    def merge(self, other: Accumulator) -> None:
        with self._lock:
            self._sums.merge(other)

    def fresh(self) -> Accumulator:
        return self._sums.fresh()

    def state(self) -> Vectors:
        return self._sums.state()

    def restore(self, state: Vectors) -> None:
        self._sums.restore(state)

    def close(self, population: int, state: Vectors, key: Key) -> Aggregate:
        return self._sums.close(population, state, key)
