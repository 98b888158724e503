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
from atoll.backends.backend import Arrangement, Result
from atoll.backends.dispatch import WorkerPool, dispatch
from atoll.backends.work import Workers, run_block
from atoll.core import safetensors
from atoll.core.random import Key
from atoll.core.vectors import Tree, Vectors, flatten, nest
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, RunError
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan
from atoll.rounds.task import ClientTask, TaskResult

#: Room for what clients receive to grow in.
SLACK = 1 << 16
#: From linux/prctl.h.
PR_SET_PDEATHSIG = 1


class Processes(Workers, WorkerPool):
    """A pool of forked workers."""

    def __init__(
        self, engine: Arrangement, plan: Plan, data: FederatedData, key: Key, notes: list[str]
    ) -> None:
        super().__init__(engine, plan, data, key, notes)
        self._shared: mmap.mmap | None = None
        self._length = 0
        self._workers: list[_Worker] = []
        self._before = stacking(plan.learner).use_threads(1)

    def _run(
        self,
        received: Tree,
        tasks: Sequence[ClientTask],
        groups: list[list[int]],
        sums: Accumulator,
    ) -> Generator[list[Result]]:
        self._share(received)
        count = min(self.engine.workers, len(groups))
        while len(self._workers) < count:
            self._workers.append(_Worker(self))
        return dispatch(self, count, groups, tasks, sums)

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []
        stacking(self._plan.learner).use_threads(self._before)

    def send(self, worker: int, tasks: Sequence[ClientTask]) -> None:
        rows = [task.row() for task in tasks]
        own = {
            str(place): {"state": task.state, "mail": task.mail} for place, task in enumerate(tasks)
        }
        about = {"do": "tasks", "tasks": rows, "length": self._length}
        with contextlib.suppress(OSError):
            _send(self._workers[worker].pipe, about, flatten(own))

    def wait(self, workers: Sequence[int]) -> list[tuple[int, list[TaskResult] | None]]:
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
        status = self._workers[worker].end()
        self._workers[worker] = _Worker(self)
        if os.WIFSIGNALED(status):
            return f"killed by signal {os.WTERMSIG(status)}"
        return f"ending with code {os.waitstatus_to_exitcode(status)}"

    def abandon(self, working: Sequence[int]) -> None:
        # New ones are forked when they are needed.
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _answer(self, worker: int) -> list[TaskResult] | None:
        try:
            answer, arrays = _receive(self._workers[worker].pipe)
        except (EOFError, OSError):
            return None
        if "why" in answer:
            raise RunError(answer["why"])
        states = nest(arrays)
        return [
            TaskResult(fault, size, states.get(str(place), {}))
            for place, (fault, size) in enumerate(answer["results"])
        ]

    def _share(self, received: Tree) -> None:
        """Write what clients receive into memory that all workers share."""
        pieces = safetensors.encode(flatten(received))
        self._length = sum(len(piece) for piece in pieces)
        if self._shared is None or self._length > len(self._shared):
            # Workers that were forked before have the old memory; others are forked when needed.
            self.abandon(())
            self._shared = mmap.mmap(-1, self._length + (self._length >> 2) + SLACK)
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
            sums = self._plan.stages.open()
            while True:
                request, memories = _receive(pipe)
                if request["do"] == "sum":
                    _send(pipe, {}, sums.state())
                    sums = self._plan.stages.open()
                else:
                    _send(pipe, *self._work(request, memories, sums))
        except (EOFError, OSError):
            pass  # the parent has gone, or has no more use for this one
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)

    def _work(
        self, request: dict[str, Any], arrays: Vectors, sums: Accumulator
    ) -> tuple[dict[str, Any], Vectors]:
        """In a worker: run a block, and give its results as they go through the pipe."""
        assert self._shared is not None
        received, _ = safetensors.decode(memoryview(self._shared)[: request["length"]])
        own, tasks = nest(arrays), []
        for place, row in enumerate(request["tasks"]):
            mine = own.get(str(place), {})
            state, mail = mine.get("state", {}), mine.get("mail", {})
            tasks.append(ClientTask.read(row, self._key, state, mail))
        method = self.engine.method
        try:
            found = run_block(method, self._plan, self._data, nest(received), tasks, sums)
        except AtollError as error:
            return {"why": str(error)}, {}
        except Exception as error:
            # The program's own mistake: another worker would make it again.
            traceback.print_exc()
            return {"why": f"a worker failed: {type(error).__name__}: {error}"}, {}
        kept = {str(place): result.state for place, result in enumerate(found)}
        return {"results": [[result.fault, result.size] for result in found]}, flatten(kept)


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that comes about."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Worker:
    """A forked process, seen from its parent."""

    def __init__(self, pool: Processes) -> None:
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # Else a sibling's pipe would stay open when the parent has gone.
            for pipe in (self.pipe, *(worker.pipe for worker in pool._workers)):
                pipe.close()
            pool.serve(theirs)
        theirs.close()

    def end(self) -> int:
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
