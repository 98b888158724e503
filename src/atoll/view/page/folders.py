"""Run folders as a source: read once, then only what was added."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll.tracking.reading import (
    find_runs,
    name_of,
    read_config,
    read_spread,
    read_status,
)
from atoll.tracking.record import Closed
from atoll.tracking.tail import RunTail
from atoll.view.page.source import State, Totals, Unknown, failures, part, row


class FolderSource:
    """The run folders below one folder; a run's id is its name.

    Args:
        root: where the folders are.
        first: the run to show first; None is the newest.
    """

    def __init__(self, root: Path, first: str | None = None) -> None:
        self._root, self._first = root, first
        self._runs: dict[str, FolderRun] = {}

    async def runs(self) -> Sequence[dict[str, Any]]:
        return await asyncio.to_thread(self._list)

    async def about(self, run: str) -> dict[str, Any]:
        return await asyncio.to_thread(lambda: self._run(run).about())

    async def since(self, run: str, round: int) -> tuple[Sequence[dict[str, Any]], State]:
        return await asyncio.to_thread(lambda: self._run(run).since(round))

    async def clients(self, run: str) -> Sequence[dict[str, Any]]:
        return await asyncio.to_thread(lambda: self._run(run).clients())

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        return await asyncio.to_thread(lambda: self._run(run).participants(round))

    def _list(self) -> list[dict[str, Any]]:
        found = {name_of(path): path for path in find_runs(self._root)}
        first = self._first if self._first in found else next(reversed(found), None)
        return [
            {"id": name, "name": name, "status": status_of(found[name]), "first": name == first}
            for name in sorted(found, key=lambda name: name == self._first)
        ]

    def _run(self, name: str) -> FolderRun:
        if name in self._runs and not (self._runs[name].path / "config.json").exists():
            del self._runs[name]
        if name not in self._runs:
            # Only what the list has: a name from outside is never a path.
            found = {name_of(path): path for path in find_runs(self._root)}
            if name not in found:
                raise Unknown(f"there is no run {name!r}")
            self._runs[name] = FolderRun(found[name])
        return self._runs[name]


class FolderRun:
    """One run folder, followed while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._epoch = epoch_of(self.path)
        self._tail = RunTail(self.path)
        #: Those that were told of: with their timings, or of a run that has ended.
        self._closed: list[Closed] = []
        self._totals = Totals()

    def about(self) -> dict[str, Any]:
        config, name = read_config(self.path), name_of(self.path)
        return {
            "id": name, "name": name, "kind": "run",
            "configuration": {"data": config["data"], "seed": config["seed"], **config["plan"]},
            "environment": _json(self.path / "environment.json"),
        }  # fmt: skip

    def since(self, round: int) -> tuple[list[dict[str, Any]], State]:
        with self._lock:
            state = self._refresh()
            served = bool(read_config(self.path)["data"].get("served"))
            new = [each for each in self._closed if each.record.round > round]
            return [row(each, served=served) for each in new], state

    def _refresh(self) -> State:
        if epoch_of(self.path) != self._epoch or self._tail.rewritten:
            self._begin()
        # Before the lines are read: of a run that has ended, all are there.
        state = self._state()
        self._closed += self._tail.read(ended=state["status"] != "running")
        return state | failures(self._tail.refusals)

    def _state(self) -> State:
        engine = _json(self.path / "engine.json")
        return {
            "epoch": self._epoch, "status": status_of(self.path),
            "total": read_config(self.path)["rounds"], "engine": engine.get("engine", ""),
            "notes": engine.get("notes", []),
        }  # fmt: skip

    def clients(self) -> list[dict[str, Any]]:
        with self._lock:
            self._refresh()
            self._totals.add(self._closed[self._totals.rounds :])
            spread, totals = read_spread(self.path), self._totals.of
            names = dict.fromkeys([*totals, *(n for each in spread.values() for n in each)])
            return [
                {
                    "name": name, **totals[name],
                    "metrics": {m: values[name] for m, values in spread.items() if name in values},
                }
                for name in names
            ]  # fmt: skip

    def participants(self, round: int) -> list[dict[str, Any]]:
        with self._lock:
            self._refresh()
            for each in self._closed:
                if each.record.round == round:
                    return [part(one) for one in each.participants]
            raise Unknown(f"round {round} has not closed")


def status_of(path: Path) -> str:
    """How a run stands; one that says it is running and is not was killed."""
    status = read_status(path)
    return "stopped" if status == "cut off" else status


def epoch_of(path: Path) -> str:
    """Another one for every start of a run in a folder, whether it begins or goes on."""
    try:
        identity = str(_json(path / "config.json").get("identity", ""))
        begun = (path / "environment.json").stat().st_mtime_ns
    except OSError:
        begun = 0
        identity = ""
    return sha256(f"{identity} {begun}".encode()).hexdigest()[:12]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
