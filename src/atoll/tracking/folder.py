"""The run folder: configuration, one line per round, checkpoints, the model, figures.

config.json         the resolved plan, the data and the seed
rounds.jsonl        one line per round; the same bytes for the same plan, data and seed
ledger.jsonl        who took part in each round, and the bytes it sent and received
timings.jsonl       real seconds per round and phase, which are nobody's promise
refusals.jsonl      why updates were refused and attempts abandoned, in words
environment.json    versions and machine
checkpoints/        the last few
clients/            what clients remember, one file per client and round that changed it
engine.json         the engine that ran it, in the words that ask for it again, and why
spread.json         the last evaluation on each client's own test part
model.safetensors   the final model
best.safetensors    the best one so far
baselines.json      what training apart and in one place gave, if that was tried
figures/            pictures, once the run is complete
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from atoll.core import files
from atoll.core.model_file import save_model
from atoll.core.vectors import Layout, Vectors
from atoll.errors import CheckpointError, ConfigurationError, MissingPackage
from atoll.learners.metrics import directions
from atoll.rounds.client_states import ClientStates
from atoll.rounds.describe import differences, digest, said
from atoll.tracking.best import Best
from atoll.tracking.observer import Observer, RoundEnd, Snapshot
from atoll.tracking.reading import hold, read_config, read_rounds, read_spread
from atoll.tracking.record import BEST, Closed, Record, Run
from atoll.tracking.tail import LINES, Tail

#: What results may depend on, where it is installed.
PACKAGES = (
    "atoll", "numpy", "torch", "scikit-learn", "jax", "flax", "keras", "transformers", "peft",
    "flwr",
)  # fmt: skip


def identity(run: Run) -> str:
    """Digest of what makes two runs the same; how long they go and are watched does not."""
    plan = {
        **run.config,
        "evaluation": None,
        "schedule": {**run.config["schedule"], "rounds": None},
    }
    return digest({"plan": plan, "data": run.data, "seed": run.seed})


def _differences(config: dict[str, Any], run: Run) -> str:
    """How a run differs from the one that a folder's configuration tells, in words."""
    mine = {**run.config, "data": run.data, "seed": run.seed}
    theirs = {**config["plan"], "data": config["data"], "seed": config["seed"]}
    for each in (mine, theirs):
        each["evaluation"] = None
        each["schedule"] = {**each["schedule"], "rounds": None}
    plain = json.loads(json.dumps(mine))
    return said(differences(plain, theirs), "now", "there")


def save_of_round(
    path: Path, record: Record, model: Vectors, layout: Layout | None, about: Mapping[str, Any]
) -> None:
    """Write the model that a round has made, with the round's figures."""
    figures = {"round": record.round, "metrics": dict(record.metrics)}
    save_model(path, model, layout, {**about, **figures})


def write_status(folder: Path, status: str, stopped: str = "") -> None:
    """Write how a run stands and why it `stopped` before its last round, if it did."""
    about = {"status": status, "stopped": stopped, "time": time.time()}
    files.write_json(folder / "status.json", about)


class RunFolder(Observer):
    """Writes a run into a folder, and reads it back to go on.

    Args:
        path: the folder; made if need be.
        every: rounds between checkpoints; the last round always has one. None makes none, for runs
            that cannot go on from one.
        keep: how many of the latest checkpoints stay.
        best: the metric by which the best model is kept; None is accuracy or, without one, loss.
        figures: whether to draw pictures at the end.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int | None = 10,
        keep: int = 3,
        best: str | None = None,
        figures: bool = True,
    ) -> None:
        if (every is not None and every < 1) or keep < 1:
            raise ConfigurationError("every and keep must be at least 1")
        self.path = Path(path)
        self.every, self.keep, self.figures = every, keep, figures
        self._metric = best
        self._files: dict[str, TextIO] = {}
        self._written: dict[int, int] = {}
        self._kept: dict[int, dict[int, int]] = {}
        self._saved = -1
        self._refused = 0
        self._held: TextIO | None = None
        self._spread: dict[str, dict[str, float]] = {}
        self._engine = ""

    def begin(self, run: Run) -> None:
        run.folder = self.path
        try:
            for folder in (self.path, self.path / "checkpoints", self.path / "clients"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not run.history:
                if (self.path / "config.json").exists():
                    raise CheckpointError(
                        f"{self.path} already holds a run; resume it, or choose another folder"
                    )
                self._written, self._kept, self._saved = {}, {}, -1
                self._best = self._no_best(run)
            files.write_json(
                self.path / "config.json",
                {
                    "identity": identity(run),
                    "seed": run.seed,
                    "rounds": run.rounds,
                    "data": run.data,
                    "plan": run.config,
                },
            )
            files.write_json(self.path / "environment.json", environment())
            write_status(self.path, "running")
            for name in LINES:
                self._files[name] = (self.path / name).open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"the run folder {self.path} cannot be written: {error.strerror or error}"
            ) from error

    def round(self, run: Run, end: RoundEnd) -> None:
        record = end.record
        for name, line in Closed(record, end.participants, end.seconds, end.phases).lines().items():
            self._line(name, line)
        self._refusals(run, record.round)
        if run.engine != self._engine:
            about = {"engine": run.engine, "notes": run.engine_notes}
            files.write_json(self.path / "engine.json", about)
            self._engine = run.engine
        if run.per_client is not self._spread:
            files.write_json(self.path / "spread.json", run.per_client)
            self._spread = run.per_client
        if run.model and self._best.note(record):
            self._save(BEST, record, run)
        last = record.round == run.rounds or run.stopped
        if self.every and (record.round % self.every == 0 or last):
            self._checkpoint(run, end.snapshot)

    def _save(self, name: str, record: Record, run: Run) -> None:
        about = {"identity": identity(run), **run.about}
        save_of_round(self.path / name, record, run.model, run.layout, about)

    def _refusals(self, run: Run, round: int) -> None:
        for reason in run.refusals[self._refused :]:
            self._line("refusals.jsonl", {"round": round, "reason": reason})
        self._refused = len(run.refusals)

    def interrupted(self, run: Run, snapshot: Snapshot) -> None:
        if not self._files:
            return  # it never began
        self._refusals(run, snapshot.round + 1)
        if self.every and run.history and snapshot.round != self._saved:
            self._checkpoint(run, snapshot)
        write_status(self.path, "interrupted")

    def end(self, run: Run) -> None:
        if run.model and run.history:
            self._save("model.safetensors", run.history[-1], run)
        if self.figures:
            self._draw(run)
        write_status(self.path, "finished", run.stopped)

    def close(self) -> None:
        for file in self._files.values():
            # Closing tries once more to write what could not be written, and was said.
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()
        if self._held is not None:
            self._held.close()
            self._held = None

    def _lock(self) -> None:
        if self._held is None:
            self._held = hold(self.path)

    def resume(self, run: Run) -> Snapshot | None:
        """Fill `run` with the folder's rounds and give its latest checkpoint.

        None if the run stopped before its first one, so that it must begin anew.
        """
        try:
            return self._read_back(run)
        except BaseException:
            self.close()
            raise

    def _read_back(self, run: Run) -> Snapshot | None:
        config = read_config(self.path)
        self._lock()
        if config["identity"] != identity(run):
            raise CheckpointError(
                f"{self.path} holds another run: its plan, data or seed differ from those given: "
                f"{_differences(config, run)} (see {self.path / 'config.json'})"
            )
        found = sorted((self.path / "checkpoints").glob("[0-9]*.safetensors"))
        if not found:
            self._truncate(0)
            (self.path / "config.json").unlink()
            return None
        about, vectors = self._load(found)
        if about.get("identity") != config["identity"]:
            raise CheckpointError(f"{found[-1]} belongs to another run")
        snapshot = self._snapshot(about, vectors)
        if snapshot.round > run.rounds:
            raise CheckpointError(
                f"{self.path} has {snapshot.round} rounds already; ask for that many or more, "
                f"not {run.rounds}"
            )
        self._truncate(snapshot.round)
        read_rounds(run, self.path)
        if [record.round for record in run.history] != list(range(1, snapshot.round + 1)):
            raise CheckpointError(
                f"{self.path / 'rounds.jsonl'} does not hold the {snapshot.round} rounds up to the "
                "checkpoint; it was changed or cut off"
            )
        self._best = self._no_best(run)
        for record in run.history:
            self._best.note(record)
        for path in found:
            self._kept[int(path.stem)] = self._index(path)
        self._written = snapshot.states.rounds()
        self._saved = snapshot.round
        self._refused = len(run.refusals)
        run.per_client = self._spread = read_spread(self.path)
        return snapshot

    def _load(self, found: list[Path]) -> tuple[dict[str, Any], Vectors]:
        """The newest checkpoint; if it is damaged, how to go on from the one before."""
        try:
            return files.load(found[-1], "checkpoint")
        except CheckpointError as error:
            before = f" ({found[-2].name})" if len(found) > 1 else ", if there is one"
            raise CheckpointError(
                f"{error}; delete it to go on from the checkpoint before{before}"
            ) from error

    def _checkpoint(self, run: Run, snapshot: Snapshot) -> None:
        index = snapshot.states.rounds()
        for member, changed in index.items():
            if self._written.get(member) != changed:
                _, memory = snapshot.states[member]
                files.save(self._client(member, changed), "memory", {}, memory)
                self._written[member] = changed
        # The lines of these rounds must outlive a power cut that the checkpoint outlives.
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"the lines in {self.path} could not be kept: {error.strerror or error}"
            ) from error
        members = np.array(sorted(index), np.int64)
        vectors = {
            **snapshot.vectors,
            "memory/members": members,
            "memory/rounds": np.array([index[int(m)] for m in members], np.int64),
        }
        about = {
            "identity": identity(run),
            "round": snapshot.round,
            "clock": snapshot.clock,
            "coordinator": snapshot.coordinator,
        }
        files.save(self._numbered(snapshot.round), "checkpoint", about, vectors)
        self._saved = snapshot.round
        self._kept[snapshot.round] = index
        self._discard()

    def _discard(self) -> None:
        """Remove checkpoints beyond the last `keep`, and memories that none of the kept needs."""
        for old in sorted(self._kept)[: -self.keep]:
            self._numbered(old).unlink(missing_ok=True)
            del self._kept[old]
        needed = {self._client(*item) for index in self._kept.values() for item in index.items()}
        for path in (self.path / "clients").glob("*.safetensors"):
            if path not in needed:
                path.unlink(missing_ok=True)

    def _snapshot(self, about: dict[str, Any], vectors: Vectors) -> Snapshot:
        try:
            members = vectors.pop("memory/members").tolist()
            rounds = vectors.pop("memory/rounds").tolist()
            memories = ClientStates()
            for member, round in zip(members, rounds, strict=True):
                _, memory = files.load(self._client(member, round), "memory")
                memories[member] = round, memory
            return Snapshot(
                int(about["round"]),
                vectors,
                memories,
                dict(about["coordinator"]),
                float(about["clock"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"a checkpoint in {self.path} is incomplete: {error!r}"
            ) from error

    def _index(self, path: Path) -> dict[int, int]:
        _, vectors = files.load(path, "checkpoint")
        pairs = zip(vectors["memory/members"], vectors["memory/rounds"], strict=True)
        return {int(member): int(round) for member, round in pairs}

    def _numbered(self, round: int) -> Path:
        return self.path / "checkpoints" / f"{round:08d}.safetensors"

    def _client(self, member: int, round: int) -> Path:
        return self.path / "clients" / f"{member:08d}-{round:08d}.safetensors"

    def _no_best(self, run: Run) -> Best:
        return Best(self._metric, directions(run.config, run.data))

    def _line(self, name: str, value: Any) -> None:
        try:
            file = self._files[name]
            file.write(json.dumps(value, separators=(",", ":")) + "\n")
            file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name} could not be written: {error.strerror or error}; free some "
                "space, then resume the run"
            ) from error

    def _truncate(self, round: int) -> None:
        """Drop lines of rounds after `round`: they are about to be run again."""
        for name in LINES:
            path = self.path / name
            if path.exists():
                kept = [line for line in Tail(path) if line["round"] <= round]
                text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept)
                files.write_atomically(path, [text.encode()])

    def _draw(self, run: Run) -> None:
        from atoll.view.plots import draw_run

        # Pictures are a convenience: `run.plot` says how to get them.
        with contextlib.suppress(MissingPackage):
            draw_run(run, self.path / "figures")


def new_folder(root: Path, name: str) -> Path:
    """Make a folder below `root` that nobody else has: name-1, name-2, ..."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"
    taken: Iterable[str] = [p.name for p in root.glob(f"{stem}-*")] if root.is_dir() else []
    numbers = [int(n.rpartition("-")[2]) for n in taken if n.rpartition("-")[2].isdecimal()]
    number = max(numbers, default=0) + 1
    while True:
        path = root / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def environment() -> dict[str, Any]:
    """Versions and machine, as far as results may depend on them."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": packages,
        "arguments": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
    }
