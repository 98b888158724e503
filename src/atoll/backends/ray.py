"""Cluster: blocks on Ray's actors, on this machine or on many.

One long-lived actor for each worker holds the plan and the data. A round's vectors are put into
the object store once, which carries them to every node once; client numbers go out, one partial sum
and a table of results come back. An actor that is lost is replaced, and what it had not handed over
is done again.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from atoll.aggregation.stage import Accumulator, stages_of
from atoll.backends.backend import Arrangement, Backend, Engine, Method, Result, step_aside
from atoll.backends.choice import ByRule, Described
from atoll.backends.dispatch import WorkerPool, dispatch
from atoll.backends.work import Workers, run_block
from atoll.core.random import Key
from atoll.core.vectors import Tree, Vectors
from atoll.data.federated import FederatedData
from atoll.errors import ConfigurationError, RunError, require
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan
from atoll.rounds.task import ClientTask, TaskResult


@dataclass(frozen=True, kw_only=True)
class RayCluster(Engine):
    """Tasks on a Ray cluster. The bytes are those of the same method and block in one process.

    Args:
        method: `Sequential()` or `Stacked(block=10)`, what a worker does with a block; its own
            numbers of workers and threads do not count. None chooses by rule.
        actors: how many; None is as many as there is room for.
        address: of a cluster that is there already ("auto", "ray://host:10001"); None starts one
            in this process, or uses the one that the process has joined.
        cores, gpus: what one actor asks of Ray. An actor trains with as many threads as cores;
            with a part of a GPU (0.25, say) several of them share it.
    """

    method: Engine | None = None
    actors: int | None = None
    address: str | None = None
    cores: int = 1
    gpus: float = 0.0

    def open(self, plan: Plan, data: FederatedData, key: Key) -> Backend:
        ray = require("ray", "ray>=2.30", "RayCluster")
        given = self.method or ByRule()
        method = given.resolve(plan, data, self.cores) if isinstance(given, Described) else given
        if not isinstance(method, Arrangement):
            raise ConfigurationError(
                f"a cluster's method must be Sequential() or Stacked(), not {given!r}"
            )
        method = replace(method, workers=1, processes=False, threads=self.cores)
        method, notes = step_aside(method, plan, data)
        return _Actors(ray, self, method, plan, data, key, notes)


class _Worker:
    """What an actor is: the plan, the data and a partial sum."""

    def __init__(self, plan: Plan, data: FederatedData, key: Key, threads: int) -> None:
        self._plan, self._data, self._key = plan, data, key
        stacking(plan.learner).use_threads(threads)
        self._sums = plan.stages.open()

    def run(
        self, method: Method, received: Tree, rows: list[Any], own: list[tuple[Tree, Vectors]]
    ) -> list[tuple[str, int, Tree]]:
        tasks = [
            ClientTask.read(row, self._key, *mine) for row, mine in zip(rows, own, strict=True)
        ]
        found = run_block(method, self._plan, self._data, received, tasks, self._sums)
        return [(each.fault, each.size, each.state) for each in found]

    def hand_over(self) -> Vectors:
        state = self._sums.state()
        self.forget()
        return state

    def forget(self) -> None:
        self._sums = self._plan.stages.open()


class _Actors(Workers, WorkerPool):
    def __init__(
        self,
        ray: Any,
        cluster: RayCluster,
        engine: Arrangement,
        plan: Plan,
        data: FederatedData,
        key: Key,
        notes: list[str],
    ) -> None:
        super().__init__(engine, plan, data, key, notes)
        self._ray, self._cluster = ray, cluster
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(
                address=cluster.address or "local", include_dashboard=False, log_to_driver=False,
                configure_logging=False,
            )  # fmt: skip
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fitting = sum(_fitting(node, cluster.cores, cluster.gpus) for node in nodes)
        self._count = cluster.actors or fitting
        if not 1 <= self._count <= fitting:
            if self._started:
                ray.shutdown()
            raise ConfigurationError(
                f"the cluster has room for {fitting} actors of {cluster.cores} cores and "
                f"{cluster.gpus:g} GPUs, but {self._count or 1} are asked for"
            )
        _carry_own_code(ray, plan, data)
        # Put once: every node fetches them once, whatever the number of its actors.
        self._federation = ray.put(_plain(plan)), ray.put(data)
        self._actors: list[Any] = []
        self._received: Any = None
        self._running: dict[Any, int] = {}

    @property
    def actors(self) -> list[Any]:
        """Handles of the actors."""
        return list(self._actors)

    def _run(
        self,
        received: Tree,
        tasks: Sequence[ClientTask],
        groups: list[list[int]],
        sums: Accumulator,
    ) -> Generator[list[Result]]:
        self._received, self._running = self._ray.put(received), {}
        count = min(self._count, len(groups))
        while len(self._actors) < count:
            self._actors.append(self._start_actor())
        return dispatch(self, count, groups, tasks, sums)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()

    def send(self, worker: int, tasks: Sequence[ClientTask]) -> None:
        rows = [task.row() for task in tasks]
        answer = self._actors[worker].run.remote(
            self.engine.method, self._received, rows, [(task.state, task.mail) for task in tasks]
        )
        self._running[answer] = worker

    def wait(self, workers: Sequence[int]) -> list[tuple[int, list[TaskResult] | None]]:
        ready, _ = self._ray.wait(list(self._running))
        found: list[tuple[int, list[TaskResult] | None]] = []
        for answer in ready:
            worker = self._running.pop(answer)
            rows = self._get(answer)
            found.append((worker, None if rows is None else [TaskResult(*row) for row in rows]))
        return found

    def fetch(self, worker: int) -> Vectors | None:
        return self._get(self._actors[worker].hand_over.remote())  # type: ignore[no-any-return]

    def replace(self, worker: int) -> str:
        self._actors[worker] = self._start_actor()
        return "with its actor or node"

    def abandon(self, working: Sequence[int]) -> None:
        # Calls to an actor are run in order: it forgets when it has finished its block.
        for actor in self._actors:
            actor.forget.remote()

    def _get(self, answer: Any) -> Any:
        """The value of a remote call; None if its actor is lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer)
        except (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError):
            return None
        except errors.RayTaskError as error:
            raise RunError(f"a worker of the cluster failed: {error.cause}") from error

    def _start_actor(self) -> Any:
        cluster = self._cluster
        actor = self._ray.remote(_Worker).options(
            num_cpus=cluster.cores, num_gpus=cluster.gpus, max_restarts=0
        )
        plan, data = self._federation
        return actor.remote(plan, data, self._key, cluster.cores)


def _fitting(node: Mapping[str, float], cores: int, gpus: float) -> int:
    """How many actors one machine has room for; parts of a GPU are of one and the same."""
    by_cores = int(node.get("CPU", 0.0)) // cores
    if not gpus:
        return by_cores
    whole = int(node.get("GPU", 0.0))
    by_gpus = whole * math.floor(1 / gpus + 1e-9) if gpus < 1 else math.floor(whole / gpus)
    return min(by_cores, by_gpus)


def _carry_own_code(ray: Any, plan: Plan, data: FederatedData) -> None:
    """Let classes and functions from files of the user's own travel with the objects.

    What is installed is imported by the actors instead.
    """
    stages = (*stages_of(plan.pipeline), *(stages_of(plan.download) if plan.download else ()))
    parts: list[Any] = [plan.learner, plan.algorithm, *stages, plan.schedule, data]
    seen: set[str] = set()
    while parts:
        part = parts.pop()
        name = part.__module__ if callable(part) and hasattr(part, "__module__") else None
        name = name or type(part).__module__
        if dataclasses.is_dataclass(part):
            parts += [getattr(part, field.name) for field in dataclasses.fields(part)]
        if hasattr(part, "modules") and callable(part.modules):
            parts += [inner for inner in part.modules() if inner is not part]
        kinds = [type(part).__module__, *(kind.__module__ for kind in type(part).__mro__)]
        for module in {name, *kinds} - seen:
            seen.add(module)
            found = sys.modules.get(module)
            if found is not None and module != "__main__" and not _installed(found):
                ray.cloudpickle.register_pickle_by_value(found)


def _installed(module: ModuleType) -> bool:
    """Whether actors can import a module by its name."""
    package = module.__name__.partition(".")[0]
    if package == "atoll" or package in sys.stdlib_module_names:
        return True
    parts = Path(getattr(module, "__file__", None) or "site-packages").parts
    return "site-packages" in parts or "dist-packages" in parts


def _plain(plan: Plan) -> Plan:
    """The plan alone: a `Federation` may hold on to things that need not travel."""
    return Plan(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)})
