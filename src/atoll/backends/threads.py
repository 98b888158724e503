"""Threads: blocks in this process, one after the other or several at the same time."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Lock, local

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Accumulator, Sink
from atoll.backends.backend import Backend, LocalEngine, Result
from atoll.backends.stacks import Turn
from atoll.backends.work import checked, grouped, run_block
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Vectors
from atoll.data.federated import FederatedData
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan


class Threads(Backend):
    """One worker in the calling thread, or several in a pool; frameworks release Python's lock."""

    def __init__(
        self, engine: LocalEngine, plan: Plan, data: FederatedData, key: Key, notes: list[str]
    ) -> None:
        self.engine: LocalEngine = engine
        self.notes = notes
        self._plan, self._data = plan, data
        self._pool: ThreadPoolExecutor | None = None
        self._ready = local()
        self._before = stacking(plan.learner).use_threads(engine.threads)
        self._checked = False

    def run(
        self, received: Vectors, turns: Sequence[Turn], sums: Accumulator
    ) -> Generator[list[Result]]:
        if not self._checked:
            self.engine = checked(self.engine, self._plan, self._data, received, turns, self.notes)
            self._checked = True
            stacking(self._plan.learner).use_threads(self.engine.threads)
            if self.engine.workers > 1:
                self._pool = ThreadPoolExecutor(self.engine.workers, "atoll")
        groups = grouped(self.engine, self._plan, self._data, turns)
        if self._pool is None or len(groups) == 1:
            for group in groups:
                yield self._block(received, turns, group, sums)
            return
        guarded = _Guarded(sums)
        pending: set[Future[list[Result]]] = {
            self._pool.submit(self._block, received, turns, group, guarded) for group in groups
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
        self, received: Vectors, turns: Sequence[Turn], group: Sequence[int], sums: Sink
    ) -> list[Result]:
        if not hasattr(self._ready, "threads"):
            # Frameworks keep this count by thread.
            stacking(self._plan.learner).use_threads(self.engine.threads)
            self._ready.threads = True
        chosen = [turns[place] for place in group]
        found = run_block(self.engine.method, self._plan, self._data, received, chosen, sums)
        return list(zip(group, found, strict=True))


class _Guarded:
    """A sum that several threads add to."""

    def __init__(self, sums: Sink) -> None:
        self._sums, self._lock = sums, Lock()
        self.takes_folds = sums.takes_folds

    def add(self, update: Update) -> None:
        with self._lock:
            self._sums.add(update)

    def add_rows(
        self,
        vectors: Vectors,
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
        passed: Sequence[bool],
    ) -> None:
        with self._lock:
            self._sums.add_rows(vectors, statistics, weights, metrics, passed)

    def add_folds(
        self,
        folds: Mapping[str, tuple[NDArray[np.int64], int]],
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        with self._lock:
            self._sums.add_folds(folds, statistics, weights, metrics)
