"""The engine of this machine: blocks of tasks on threads or on processes."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.backends.allocator import keep_freed_memory
from atoll.backends.backend import Arrangement, Backend, Engine, step_aside
from atoll.backends.processes import Processes
from atoll.backends.threads import Threads
from atoll.core.random import Key
from atoll.data.federated import FederatedData
from atoll.rounds.plan import Plan


@dataclass(frozen=True, kw_only=True)
class LocalEngine(Arrangement, Engine):
    """Tasks on this machine, every number said; `Sequential` and `Stacked` find some by rule."""

    def open(self, plan: Plan, data: FederatedData, key: Key) -> Backend:
        keep_freed_memory()
        engine, notes = step_aside(self, plan, data)
        kind = Processes if engine.processes else Threads
        return kind(engine, plan, data, key, notes)
