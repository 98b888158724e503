"""Processes: workers forked from this one, which share its data and read the model from it.

A round's vectors are written once into memory that all share. A worker gets the numbers of clients,
keeps one partial sum, and hands it over at the end. If it dies, another takes its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import traceback
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from atoll.aggregation.stage import Accumulator
from atoll.backends.backend import Backend, LocalEngine, Result
from atoll.backends.dispatch import WorkerPool, dispatch
from atoll.backends.stacks import Delivery, Turn
from atoll.backends.work import checked, grouped, run_block
from atoll.core import safetensors
from atoll.core.random import Key
from atoll.core.vectors import Vectors, part, prefixed
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, RunError
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan

#: From linux/prctl.h.
PR_SET_PDEATHSIG = 1


class Processes(Backend, WorkerPool):
    """A crew of forked workers."""

    def __init__(
        self, engine: LocalEngine, plan: Plan, data: FederatedData, key: Key, notes: list[str]
    ) -> None:
        self.engine: LocalEngine = engine
        self.notes = notes
        self._plan, self._data, self._key = plan, data, key
        self._shared: mmap.mmap | None = None
        self._workers: list[_Worker] = []
        self._checked = False
        self._before = stacking(plan.learner).use_threads(1)

    @property
    def pids(self) -> list[int]:
        """The workers' process numbers."""
        return [worker.pid for worker in self._workers]

    def run(
        self, received: Vectors, turns: Sequence[Turn], sums: Accumulator
    ) -> Generator[list[Result]]:
        if not self._checked:
            self.engine = checked(self.engine, self._plan, self._data, received, turns, self.notes)
            self._checked = True
        self._share(received)
        groups = grouped(self.engine, self._plan, self._data, turns)
        count = min(self.engine.workers, len(groups))
        while len(self._workers) < count:
            self._workers.append(_Worker(self))
        return dispatch(self, count, groups, turns, sums)

    def close(self) -> None:
        for worker in self._workers:
            worker.bury()
        self._workers = []
        stacking(self._plan.learner).use_threads(self._before)

    def send(self, worker: int, turns: Sequence[Turn]) -> None:
        rows = [turn.row() for turn in turns]
        memories: Vectors = {}
        for place, turn in enumerate(turns):
            memories |= prefixed(f"{place}/", turn.memory)
        with contextlib.suppress(OSError):
            _send(self._workers[worker].pipe, {"do": "turns", "turns": rows}, memories)

    def wait(self, workers: Sequence[int]) -> list[tuple[int, list[Delivery] | None]]:
        ready = wait([self._workers[worker].pipe for worker in workers])
        return [
            (worker, self._answer(worker))
            for worker in workers
            if self._workers[worker].pipe in ready
        ]

    def fetch(self, worker: int) -> Vectors | None:
        pipe = self._workers[worker].pipe
        try:
            _send(pipe, {"do": "sum"}, {})
            return _receive(pipe)[1]
        except (EOFError, OSError):
            return None

    def replace(self, worker: int) -> str:
        status = self._workers[worker].bury()
        self._workers[worker] = _Worker(self)
        if os.WIFSIGNALED(status):
            return f"killed by signal {os.WTERMSIG(status)}"
        return f"ending with code {os.waitstatus_to_exitcode(status)}"

    def abandon(self, working: Sequence[int]) -> None:
        # New ones are forked when they are needed.
        for worker in self._workers:
            worker.bury()
        self._workers = []

    def _answer(self, worker: int) -> list[Delivery] | None:
        try:
            answer, arrays = _receive(self._workers[worker].pipe)
        except (EOFError, OSError):
            return None
        if "why" in answer:
            raise RunError(answer["why"])
        return [
            Delivery(fault, size, part(f"{place}/", arrays))
            for place, (fault, size) in enumerate(answer["deliveries"])
        ]

    def _share(self, received: Vectors) -> None:
        pieces = safetensors.encode(received)
        length = sum(len(piece) for piece in pieces)
        if self._shared is None:
            self._shared = mmap.mmap(-1, max(length, 1))
        if length != len(self._shared):
            raise RunError("what clients receive has another size than in the round before")
        self._shared.seek(0)
        for piece in pieces:
            self._shared.write(piece)

    def serve(self, pipe: Connection) -> NoReturn:
        """The life of a worker: blocks in, results out, until the pipe is closed."""
        _die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = 0
        try:
            stacking(self._plan.learner).use_threads(self.engine.threads)
            sums = self._plan.stages.open(self._plan.schema)
            while True:
                request, memories = _receive(pipe)
                if request["do"] == "sum":
                    _send(pipe, {}, sums.state())
                    sums = self._plan.stages.open(self._plan.schema)
                else:
                    _send(pipe, *self._work(request["turns"], memories, sums))
        except (EOFError, OSError):
            pass  # the parent has gone, or has no more use for this one
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)

    def _work(
        self, rows: list[list[Any]], memories: Vectors, sums: Accumulator
    ) -> tuple[dict[str, Any], Vectors]:
        """In a worker: run a block, and give its results as they go through the pipe."""
        assert self._shared is not None
        received, _ = safetensors.decode(memoryview(self._shared))
        turns = [
            Turn.read(row, self._key, part(f"{place}/", memories)) for place, row in enumerate(rows)
        ]
        try:
            found = run_block(self.engine.method, self._plan, self._data, received, turns, sums)
        except AtollError as error:
            return {"why": str(error)}, {}
        except Exception as error:
            # The program's own mistake: another worker would make it again.
            traceback.print_exc()
            return {"why": f"a worker failed: {type(error).__name__}: {error}"}, {}
        kept: Vectors = {}
        for place, delivery in enumerate(found):
            kept |= prefixed(f"{place}/", delivery.memory)
        return {"deliveries": [[delivery.fault, delivery.size] for delivery in found]}, kept


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that comes about."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Worker:
    """A forked process, seen from its parent."""

    def __init__(self, crew: Processes) -> None:
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # Else a sibling's pipe would stay open when the parent has gone.
            for pipe in (self.pipe, *(worker.pipe for worker in crew._workers)):
                pipe.close()
            crew.serve(theirs)
        theirs.close()

    def bury(self) -> int:
        """End the process if it has not ended; its status."""
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            return os.waitpid(self.pid, 0)[1]
        except ChildProcessError:
            return 0


def _send(pipe: Connection, about: dict[str, Any], arrays: Vectors) -> None:
    pipe.send_bytes(json.dumps(about).encode())
    pipe.send_bytes(b"".join(safetensors.encode(arrays)))


def _receive(pipe: Connection) -> tuple[dict[str, Any], Vectors]:
    about = json.loads(pipe.recv_bytes())
    # Frameworks warn about arrays that cannot be written, and bytes cannot.
    arrays, _ = safetensors.decode(memoryview(bytearray(pipe.recv_bytes())))
    return about, arrays
