"""The choice of an engine: by a name, by a rule, or by measuring on the first clients."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from atoll.aggregation.stage import Accumulator
from atoll.data.federated import FederatedData
from atoll.errors import ConfigurationError
from atoll.keys import Key
from atoll.rounds.cohort import Turn
from atoll.rounds.plan import Plan
from atoll.simulation.engine import Crew, Engine, Local, Method, Result, cores
from atoll.simulation.work import run_block
from atoll.vectors import Vectors

#: A stack's parameters should stay in a processor's caches.
STACK_BYTES = 16 << 20
STACK_LIMIT = 128
#: Local steps of one measurement, and how often the best of it is taken.
TRIAL_STEPS, TRIALS = 4, 2
FORM = re.compile(r"(sequential|stacked)\((.*)\)")


def Sequential(  # noqa: N802
    *, workers: int | None = None, processes: bool = False, threads: int | None = None
) -> Engine:
    """One client after the other, `workers` of them at the same time (None: one per core).

    Args:
        processes: let workers be processes that share memory, rather than threads.
        threads: threads within one operation; None is one, or as many as there are cores where
            one worker has them to itself.
    """
    return Chosen("sequential", 1, workers, processes, threads)


def Stacked(  # noqa: N802
    *,
    block: int | None = None,
    workers: int | None = None,
    processes: bool = False,
    threads: int | None = None,
) -> Engine:
    """Blocks of clients at once: one batched product where there would be many small ones.

    Args:
        block: clients in a block; None fits the stack to the processor's caches.
        workers: blocks at the same time; None is one, whose operations use every core.
        processes, threads: as for `Sequential`.
    """
    return Chosen("stacked", block, workers, processes, threads)


@dataclass(frozen=True)
class Chosen(Engine):
    """An engine whose open questions are answered by rule, from the plan and this machine."""

    method: Method | None = None
    block: int | None = None
    workers: int | None = None
    processes: bool = False
    threads: int | None = None

    def resolve(self, plan: Plan, data: FederatedData) -> Local:
        """The engine with every number set."""
        examples = data.train(0)
        method = self.method or (
            "stacked" if plan.learner.prefers_stacks(examples) else "sequential"
        )
        cohort = plan.schedule.needed(len(data))
        block, workers, threads = 1, self.workers, self.threads
        if method == "stacked":
            fitting = max(1, STACK_BYTES // max(4 * plan.learner.layout.size, 1))
            block = min(fitting, STACK_LIMIT, cohort) if self.block is None else self.block
            if workers is None:
                workers = min(cores(), -(-cohort // block)) if self.processes else 1
        else:
            # Many threads in small operations only get in each other's way.
            apart = self.processes or plan.learner.threads_safely(examples)
            if workers is None:
                workers = min(cores(), cohort) if apart else 1
            threads = 1 if threads is None else threads
        if threads is None:
            threads = cores() if workers == 1 else 1
        return Local(
            method=method, block=block, workers=workers, processes=self.processes, threads=threads
        )

    def open(self, plan: Plan, data: FederatedData, key: Key) -> Crew:
        return self.resolve(plan, data).open(plan, data, key)


@dataclass(frozen=True)
class Auto(Engine):
    """Measures candidates on the first clients of the first round and keeps the fastest.

    The choice is recorded in the run; that engine, given by name, makes the same bytes again.
    """

    def open(self, plan: Plan, data: FederatedData, key: Key) -> Crew:
        return _Measuring(plan, data, key)


class _Measuring(Crew):
    """Chooses when it sees the first turns, and is the chosen crew from then on."""

    def __init__(self, plan: Plan, data: FederatedData, key: Key) -> None:
        self._plan, self._data, self._key = plan, data, key
        self._crew: Crew | None = None
        self.engine: Engine = Auto()
        self.notes: list[str] = []

    def run(
        self, received: Vectors, turns: Sequence[Turn], sums: Accumulator
    ) -> Generator[list[Result]]:
        if self._crew is None:
            fastest, figures = measure(self._plan, self._data, received, turns)
            self._crew = fastest.open(self._plan, self._data, self._key)
            self.notes += [*figures, *self._crew.notes]
        yield from self._crew.run(received, turns, sums)
        self.engine = self._crew.engine

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()


def candidates(plan: Plan, data: FederatedData, turns: int) -> list[Local]:
    """What may be fastest: one by one or in blocks of several sizes, on all cores."""
    learner, examples = plan.learner, data.train(0)
    safe = learner.threads_safely(examples)
    workers = min(cores(), turns) if safe else 1
    plain = Local(method="sequential", block=1, workers=workers, processes=False, threads=1)
    found = [plain]
    if cores() > 1:
        found.append(replace(plain, workers=1, threads=cores()))
    if not learner.stacks(examples):
        most = min(turns, STACK_LIMIT)
        sizes = {most} | {size for size in (4, 16, 64) if size < most}
        # Beyond this the stack no longer fits anything near the processor.
        roomy = [size for size in sizes if size * learner.layout.size * 4 <= 16 * STACK_BYTES]
        stacks = [replace(plain, method="stacked", block=size) for size in sorted(roomy)]
        found += stacks
        if cores() > 1:
            found += [replace(stack, workers=1, threads=cores()) for stack in stacks]
    return found


def measure(
    plan: Plan, data: FederatedData, received: Vectors, turns: Sequence[Turn]
) -> tuple[Local, list[str]]:
    """The fastest candidate, and what was measured, in sentences.

    Each takes a few steps of the first clients; what it makes is thrown away. Workers are taken to
    scale: with several, a candidate is run by one of them on one core.
    """
    best, figures, before = None, [], plan.learner.use_threads(1)
    try:
        for engine in candidates(plan, data, len(turns)):
            chosen = [_short(plan, data, turn) for turn in turns[: engine.block]]
            plan.learner.use_threads(engine.threads)
            try:
                seconds = min(_time(engine, plan, data, received, chosen) for _ in range(TRIALS))
            except Exception as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                figures.append(f"{engine} does not work here ({line})")
                continue
            steps = sum(t.assignment.steps(_planned(plan, data, t)) for t in chosen)
            each = seconds / steps / engine.workers
            figures.append(f"{engine}: {each * 1e6:.0f} us for each local step")
            if best is None or each < best[0]:
                best = (each, engine)
    finally:
        plan.learner.use_threads(before)
    if best is None:
        return Chosen("sequential", 1, 1).resolve(plan, data), figures
    return best[1], figures


def _time(
    engine: Local, plan: Plan, data: FederatedData, received: Vectors, turns: Sequence[Turn]
) -> float:
    sums = plan.stages.open(plan.schema)
    started = time.perf_counter()
    run_block(engine.method, plan, data, received, turns, sums)
    return time.perf_counter() - started


def _planned(plan: Plan, data: FederatedData, turn: Turn) -> int:
    return plan.learner.planned_steps(data.size(turn.member))


def _short(plan: Plan, data: FederatedData, turn: Turn) -> Turn:
    share = min(1.0, TRIAL_STEPS / _planned(plan, data, turn)) * turn.assignment.fraction
    return replace(turn, assignment=replace(turn.assignment, fraction=share))


def engine_of(given: Engine | str | None) -> Engine:
    """An engine from what people may write: None, "auto", "sequential", "stacked(block=8)", ..."""
    if isinstance(given, Engine):
        return given
    if given is None:
        return Chosen()
    text = given.strip() if isinstance(given, str) else ""
    names: dict[str, Engine] = {"auto": Auto(), "sequential": Sequential(), "stacked": Stacked()}
    if text in names:
        return names[text]
    match = FORM.fullmatch(text)
    if match:
        return _parsed(match[1], match[2])  # type: ignore[arg-type]
    raise ConfigurationError(
        f"engine {given!r} is not known; use 'auto', 'sequential', 'stacked', or one with its "
        "numbers, such as 'stacked(block=10, workers=2, threads=1)'"
    )


def _parsed(method: Literal["sequential", "stacked"], inside: str) -> Engine:
    numbers: dict[str, int] = {}
    for item in filter(None, (item.strip() for item in inside.split(","))):
        name, _, value = item.partition("=")
        if name not in ("block", "workers", "processes", "threads") or not value.isdecimal():
            raise ConfigurationError(
                f"{item!r} says nothing about an engine; it has block, workers or processes, and "
                "threads, each a whole number"
            )
        numbers[name] = int(value)
    processes = numbers.pop("processes", None)
    return Chosen(
        method,
        numbers.get("block", 1 if method == "sequential" else None),
        numbers.get("workers") if processes is None else processes,
        processes is not None,
        numbers.get("threads"),
    )
