"""The choice of an engine: by a name, by a rule, or by measuring on the first clients."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from atoll.aggregation.stage import Accumulator
from atoll.backends.backend import Backend, Engine, Result, cores
from atoll.backends.local import LocalEngine
from atoll.backends.work import expected_work
from atoll.core.random import Key
from atoll.core.vectors import Tree
from atoll.data.federated import FederatedData
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan
from atoll.rounds.task import ClientTask

#: A stack's parameters should stay in a processor's caches.
STACK_BYTES = 16 << 20
STACK_LIMIT = 128
#: What a stack's activations may come to, which grow with it too.
ACTIVATION_BYTES = 32 << 20
#: Local steps of a short and a longer measurement, and seconds after which no further one is begun.
TRIAL_STEPS, BUDGET = (2, 6), 1.0


class Described(Engine):
    """An engine of this machine whose open questions are answered by rule, from the plan."""

    @abstractmethod
    def resolve(self, plan: Plan, data: FederatedData, threads: int | None = None) -> LocalEngine:
        """The engine with every number set; `threads` within an operation, if they are given."""

    def open(self, plan: Plan, data: FederatedData, key: Key) -> Backend:
        return self.resolve(plan, data).open(plan, data, key)


@dataclass(frozen=True, kw_only=True)
class Sequential(Described):
    """One client after the other, `workers` of them at the same time (None: one per core).

    Args:
        processes: let workers be processes that share memory, rather than threads: for learners
            that keep their model in one place, which threads cannot share.
        threads: threads within one operation; None is one, or as many as there are cores where
            one worker has them to itself.
    """

    workers: int | None = None
    processes: bool = False
    threads: int | None = None

    def resolve(self, plan: Plan, data: FederatedData, threads: int | None = None) -> LocalEngine:
        apart = self.processes or stacking(plan.learner).threads_safely(data.train(0))
        workers = self.workers
        if workers is None:
            workers = min(cores(), plan.schedule.needed(len(data))) if apart else 1
        # Many threads in small operations only get in each other's way.
        threads = threads or self.threads or 1
        return LocalEngine(
            method="sequential", block=1, workers=workers, processes=self.processes,
            threads=threads,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stacked(Described):
    """Blocks of clients at once: one batched product where there would be many small ones.

    Args:
        block: clients in a block; None fits the stack to the processor's caches.
        workers: blocks at the same time; None is one, whose operations use every core.
        processes, threads: as for `Sequential`.
    """

    block: int | None = None
    workers: int | None = None
    processes: bool = False
    threads: int | None = None

    def resolve(self, plan: Plan, data: FederatedData, threads: int | None = None) -> LocalEngine:
        cohort = plan.schedule.needed(len(data))
        block = self.block
        if block is None:
            block = -(-cohort // -(-cohort // fitting(plan, data)))  # evenly
        workers = self.workers
        if workers is None:
            workers = min(cores(), -(-cohort // block)) if self.processes else 1
        threads = threads or self.threads or (cores() if workers == 1 else 1)
        return LocalEngine(
            method="stacked", block=block, workers=workers, processes=self.processes,
            threads=threads,
        )  # fmt: skip


@dataclass(frozen=True)
class ByRule(Described):
    """Stacks where the learner prefers them, else one client after the other."""

    def resolve(self, plan: Plan, data: FederatedData, threads: int | None = None) -> LocalEngine:
        stacks = stacking(plan.learner).prefers_stacks(data.train(0))
        return (Stacked() if stacks else Sequential()).resolve(plan, data, threads)


@dataclass(frozen=True)
class Auto(Engine):
    """Measures candidates on the first clients of the first round and keeps the fastest.

    The choice is recorded in the run; that engine, given by name, makes the same bytes again.
    """

    def open(self, plan: Plan, data: FederatedData, key: Key) -> Backend:
        return _Measuring(plan, data, key)


class _Measuring(Backend):
    """Chooses when it sees the first tasks, and is the chosen backend from then on."""

    def __init__(self, plan: Plan, data: FederatedData, key: Key) -> None:
        self._plan, self._data, self._key = plan, data, key
        self._backend: Backend | None = None
        self.engine: Engine = Auto()
        self.notes: list[str] = []

    def run(
        self, received: Tree, tasks: Sequence[ClientTask], sums: Accumulator
    ) -> Generator[list[Result]]:
        if self._backend is None:
            fastest, figures = measure(self._plan, self._data, self._key, received, tasks)
            self._backend = fastest.open(self._plan, self._data, self._key)
            self.notes += [*figures, *self._backend.notes]
        yield from self._backend.run(received, tasks, sums)
        self.engine = self._backend.engine

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()


def candidates(plan: Plan, data: FederatedData, tasks: int) -> list[LocalEngine]:
    """What may be fastest, the likeliest first: what the rule would choose, then the others."""
    learner, examples = plan.learner, data.train(0)
    workers = min(cores(), tasks) if stacking(learner).threads_safely(examples) else 1
    plain = LocalEngine(method="sequential", block=1, workers=workers, processes=False, threads=1)
    found = [ByRule().resolve(plan, data), plain]
    if cores() > 1:
        found.append(replace(plain, workers=1, threads=cores()))
    if not stacking(learner).stacks(examples):
        most = min(tasks, STACK_LIMIT)
        for size in sorted({most, *(size for size in (4, 16, 64) if size < most)}, reverse=True):
            # Beyond this the stack no longer fits anything near the processor.
            if size <= 4 * fitting(plan, data):
                stack = replace(plain, method="stacked", block=size)
                found += [replace(stack, workers=1, threads=cores()), stack]
    return list(dict.fromkeys(found))


def fitting(plan: Plan, data: FederatedData) -> int:
    """How many clients a stack may have so that it stays in the processor's caches."""
    activations = stacking(plan.learner).activation_bytes(data.train(0))
    by_parameters = STACK_BYTES // max(4 * plan.learner.layout.size, 1)
    by_activations = ACTIVATION_BYTES // max(activations, 1)
    return max(1, min(by_parameters, by_activations, STACK_LIMIT))


def measure(
    plan: Plan, data: FederatedData, key: Key, received: Tree, tasks: Sequence[ClientTask]
) -> tuple[LocalEngine, list[str]]:
    """The fastest candidate, and what was measured, in sentences.

    Each runs a few steps of the first clients, with all its workers; what it makes is thrown away.
    When the time for that is up, the candidates that are left are not tried.
    """
    best, figures, started = None, [], time.perf_counter()
    for engine in candidates(plan, data, len(tasks)):
        if best is not None and time.perf_counter() - started > BUDGET:
            figures.append(f"{engine} was not tried: measuring had taken long enough")
            continue
        few = tasks[: engine.block * engine.workers]
        try:
            each = _seconds_per_step(engine, plan, data, key, received, few)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            figures.append(f"{engine} does not work here ({line})")
            continue
        figures.append(f"{engine}: {each * 1e6:.0f} us for each local step")
        if best is None or each < best[0]:
            best = (each, engine)
    if best is None:
        return Sequential(workers=1).resolve(plan, data), figures
    return best[1], figures


def _seconds_per_step(
    engine: LocalEngine,
    plan: Plan,
    data: FederatedData,
    key: Key,
    received: Tree,
    tasks: Sequence[ClientTask],
) -> float:
    """Seconds for each step of these tasks: from short ones, what whole ones would take."""
    whole = sum(expected_work(plan, data, task) for task in tasks)
    work, times = [], []
    with engine.open(plan, data, key) as backend:
        for limit in (1, *TRIAL_STEPS):  # the first is to warm up
            short = [_short(plan, data, task, limit) for task in tasks]
            started = time.perf_counter()
            for _ in backend.run(received, short, plan.stages.open()):
                pass
            times.append(time.perf_counter() - started)
            work.append(sum(expected_work(plan, data, task) for task in short))
    more = work[2] - work[1]
    slope = max(times[2] - times[1], 0.0) / more if more else 0.0
    return (times[2] + slope * (whole - work[2])) / whole


def _short(plan: Plan, data: FederatedData, task: ClientTask, steps: int) -> ClientTask:
    planned = plan.learner.planned_steps(data.size(task.member))
    share = min(1.0, steps / planned) * task.assignment.fraction
    return task._replace(assignment=replace(task.assignment, fraction=share))
