"""Run folders as a source: read once, then only what was added."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from atoll.errors import CheckpointError
from atoll.tracking.reading import find_runs, in_use, read_config, read_spread, read_status
from atoll.view.page.source import Row, State, Unknown

FAILURES = 50


class FolderSource:
    """The run folders below one folder; a run's id is the name of its folder.

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

    async def since(self, run: str, round: int) -> tuple[Sequence[Row], State]:
        return await asyncio.to_thread(lambda: self._run(run).since(round))

    async def clients(self, run: str) -> Sequence[dict[str, Any]]:
        return await asyncio.to_thread(lambda: self._run(run).clients())

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        return await asyncio.to_thread(lambda: self._run(run).participants(round))

    def _list(self) -> list[dict[str, Any]]:
        paths = find_runs(self._root)
        if self._first is not None:
            paths.sort(key=lambda path: path.name == self._first)
        return [
            {
                "id": path.name, "name": path.name, "status": status_of(path),
                "first": path.name == (self._first or paths[-1].name),
            }
            for path in paths
        ]  # fmt: skip

    def _run(self, name: str) -> FolderRun:
        if name in self._runs and not (self._root / name / "config.json").exists():
            del self._runs[name]
        if name not in self._runs:
            # Only what the list has: a name from outside is never a path.
            if name not in {path.name for path in find_runs(self._root)}:
                raise Unknown(f"there is no run {name!r}")
            self._runs[name] = FolderRun(self._root / name)
        return self._runs[name]


class FolderRun:
    """One run folder, followed while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._tails = {
            name: Tail(self.path / f"{name}.jsonl")
            for name in ("rounds", "timings", "refusals", "ledger")
        }
        self._epoch = epoch_of(self.path)
        self._rows: list[Row] = []
        #: Those that were told of: with their timings, or of a run that has ended.
        self._told: list[Row] = []
        self._timings: dict[int, dict[str, Any]] = {}
        self._failures: list[dict[str, Any]] = []
        self._failed = 0
        self._totals: dict[str, dict[str, Any]] = defaultdict(
            lambda: {"accepted": 0, "missed": 0, "up": 0, "down": 0, "last": 0}
        )
        self._places: dict[int, int] = {}

    def about(self) -> dict[str, Any]:
        config = read_config(self.path)
        environment = _json(self.path / "environment.json")
        return {
            "id": self.path.name, "name": self.path.name, "kind": "run",
            "configuration": {
                "data": config["data"], "seed": config["seed"], **config["plan"],
            },
            "environment": environment,
        }  # fmt: skip

    def since(self, round: int) -> tuple[list[Row], State]:
        with self._lock:
            state = self._refresh()
            return [row for row in self._told if row["round"] > round], state

    def _refresh(self) -> State:
        if epoch_of(self.path) != self._epoch or any(
            tail.was_rewritten() for tail in self._tails.values()
        ):
            self._begin()
        # Before the lines are read: of a run that has ended, all are there.
        state = self._state()
        for _, line in self._tails["rounds"]:
            self._rows.append(
                {
                    **{k: line.get(k) for k in ("round", "metrics", "measurements", "invited")},
                    **{k: line.get(k) for k in ("accepted", "attempts", "clock")},
                    "up": line.get("bytes_up"), "down": line.get("bytes_down"),
                }
            )  # fmt: skip
        for _, line in self._tails["timings"]:
            self._timings[line["round"]] = line
        for row in self._rows[len(self._told) :]:
            timing = self._timings.get(row["round"])
            if timing is None and state["status"] == "running":
                break  # it is about to be written, and a row is told of once
            timing = timing or {}
            row |= {"seconds": timing.get("seconds"), "phases": timing.get("phases", {})}
            self._told.append(row)
        for _, line in self._tails["refusals"]:
            self._failed += 1
            self._failures.append({"round": line["round"], "text": str(line.get("reason", ""))})
        del self._failures[:-FAILURES]
        return {**state, "failures": list(self._failures), "failed": self._failed}

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
            for place, line in self._tails["ledger"]:
                self._places[line["round"]] = place
                for client, outcome, down, up in line.get("participants", ()):
                    total = self._totals[client]
                    total["accepted" if outcome == "accepted" else "missed"] += 1
                    total["up"] += up
                    total["down"] += down
                    if outcome == "accepted":
                        total["last"] = line["round"]
            spread = read_spread(self.path)
            names = dict.fromkeys([*self._totals, *(n for each in spread.values() for n in each)])
            return [
                {
                    "name": name, **self._totals[name],
                    "metrics": {m: values[name] for m, values in spread.items() if name in values},
                }
                for name in names
            ]  # fmt: skip

    def participants(self, round: int) -> list[dict[str, Any]]:
        if round not in self._places:
            self.clients()
        if round not in self._places:
            raise Unknown(f"round {round} has not closed")
        with (self.path / "ledger.jsonl").open("rb") as file:
            file.seek(self._places[round])
            line = json.loads(file.readline())
        return [
            {"client": client, "outcome": outcome, "down": down, "up": up}
            for client, outcome, down, up in line.get("participants", ())
        ]


class Tail:
    """A file of JSON lines that grows; iterating gives what was added since the last time."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._file = path, 0, 0

    def was_rewritten(self) -> bool:
        """Whether what was read is no longer what is there, as when a run is resumed."""
        if self._at == 0:
            return False
        try:
            found = self._path.stat()
        except OSError:
            return True
        return found.st_size < self._at or found.st_ino != self._file

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place in the file, line) of each complete new line."""
        try:
            file = self._path.open("rb")
        except OSError:
            return
        with file:
            self._file = os.fstat(file.fileno()).st_ino
            file.seek(self._at)
            for text in file:
                if not text.endswith(b"\n"):
                    return  # it is being written
                try:
                    line = json.loads(text)
                    good = isinstance(line, dict) and isinstance(line.get("round"), int)
                except ValueError:
                    good = False
                if not good:
                    raise CheckpointError(f"{self._path} is damaged at byte {self._at}")
                place, self._at = self._at, self._at + len(text)
                yield place, line


def status_of(path: Path) -> str:
    """How a run stands; one that says it is running and is not was killed."""
    status = read_status(path)
    return "stopped" if status == "running" and not in_use(path) else status


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
