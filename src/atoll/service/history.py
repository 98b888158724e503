"""History: a served federation's rounds as the run folder that a simulation leaves.

The database is the truth. The folder is for people and for the tools that read runs: it is written
anew from the database when a server starts, and grows by a line with each round.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa

from atoll.core import files
from atoll.core.vectors import Vectors
from atoll.errors import CheckpointError
from atoll.learners.metrics import directions
from atoll.rounds.describe import about_model, describe, digest
from atoll.rounds.plan import Plan
from atoll.rounds.stopping import stop_reason
from atoll.service.storage.database import Row, Store
from atoll.service.storage.tables import answers, assignments, rounds
from atoll.tracking.best import Best
from atoll.tracking.folder import environment, save_of_round, write_status
from atoll.tracking.reading import hold
from atoll.tracking.record import BEST, Closed, Participant, Record
from atoll.tracking.tail import LINES

OUTCOMES = {
    "accepted": "accepted", "refused": "malformed", "lost": "lost", "spared": "no longer needed",
    "open": "no longer needed",
}  # fmt: skip


class History:
    """The rounds of a served federation.

    Args:
        plan: what all parties agree on.
        seed: of every draw.
        store: where the rounds are kept.
        folder: the run folder; None keeps none.
    """

    def __init__(self, plan: Plan, seed: int, store: Store, folder: Path | None) -> None:
        self._plan, self._seed, self._store, self._folder = plan, seed, store, folder
        #: Why updates were refused, sites lost and attempts abandoned so far, each with its round.
        self.refusals: list[tuple[int, str]] = []
        self._closed: list[Closed] = []
        self.best = Best(plan.evaluation.best, directions(describe(plan), {}))
        self._begun = 0.0
        self._kept = 0
        self._held: TextIO | None = None

    @property
    def records(self) -> list[Record]:
        """Every closed round."""
        return [closed.record for closed in self._closed]

    @property
    def closed(self) -> Sequence[Closed]:
        """Every closed round, with who took part."""
        return self._closed

    def begin(self, version: int) -> None:
        """Take up the rounds up to a version, and write the folder anew."""
        first = self._store.version(0)
        self._begun = first["made"] if first else time.time()
        query = sa.select(rounds.c.record).where(rounds.c.state == "closed")
        rows = self._store.rows(query.order_by(rounds.c.round))
        self._closed = [Closed.read(json.loads(row["record"])) for row in rows]
        for record in self.records:
            self.best.note(record)
        self.refusals = self._refusals()
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # A process that has lost the lease may still have the folder: the database is the truth.
        with contextlib.suppress(CheckpointError):
            self._held = hold(self._folder)
        files.write_json(self._folder / "config.json", self._config())
        # What it was called with may hold the database's password.
        about = {name: value for name, value in environment().items() if name != "arguments"}
        files.write_json(self._folder / "environment.json", about)
        for name in ("model.safetensors", BEST):
            (self._folder / name).unlink(missing_ok=True)
        lines: dict[str, list[Any]] = {name: [] for name in LINES}
        for closed in self._closed:
            for name, line in closed.lines().items():
                lines[name].append(line)
        lines["refusals.jsonl"] = self._untold()
        for name, each in lines.items():
            text = "".join(_line(line) for line in each)
            files.write_atomically(self._folder / name, [text.encode()])
        self._status("running")

    def note(self, id: str, reason: str) -> None:
        """Something went wrong with an assignment or (by its number) a round."""
        self.refusals.append((int(id.partition(".")[0]), reason))

    def made(
        self,
        round: int,
        metrics: Mapping[str, float],
        measurements: Mapping[str, float],
        down: int,
        now: float,
        phases: Mapping[str, float],
    ) -> Closed:
        """A round that has made its version, not yet known; `down` is the size of its model."""
        parts, invited, accepted = self._participants(round, down)
        attempts = self._store.rows(sa.select(rounds).where(rounds.c.round == round))
        # Without rounds in lockstep, one begins where the last one ended.
        lockstep = self._plan.schedule.lockstep
        before = self._store.version(round - 1)
        begun = min(row["opened"] for row in attempts)
        if not lockstep and before is not None:
            begun = before["made"]
        seconds = max(0.0, now - begun)
        record = Record(
            round,
            metrics,
            measurements,
            invited,
            accepted,
            len(attempts),
            sum(part.up for part in parts),
            sum(part.down for part in parts),
            max(0.0, now - self._begun),
        )
        shown = {"clients": max(0.0, seconds - sum(phases.values())), **phases}
        closed = Closed(record, parts, seconds, shown)
        self._closed = [each for each in self._closed if each.record.round < round]
        self._closed.append(closed)
        self.best.note(record)
        return closed

    def add(self, round: int) -> None:
        """Add a round to the folder's files."""
        if self._folder is None:
            return
        lines = {name: [line] for name, line in self._closed[-1].lines().items()}
        self._append({"refusals.jsonl": self._untold(), **lines})

    def close(self, *, failed: bool, models: Mapping[str, Vectors]) -> None:
        """The server leaves; with the final "model" and the "best", if there are no more rounds."""
        if self._folder is None:
            return
        self._append({"refusals.jsonl": self._untold()})
        run = self._config()["identity"]
        about = {"identity": run, **about_model(self._plan)}
        for name, file, record in (
            ("model", "model.safetensors", self.records[-1] if self.records else None),
            ("best", BEST, self.best.record),
        ):
            if name in models and record is not None:
                layout = self._plan.split.shared
                save_of_round(self._folder / file, record, models[name], layout, about)
        stopped = stop_reason(self._plan.stop, self.records)
        done = stopped or len(self._closed) >= self._plan.schedule.rounds
        self._status("failed" if failed else "finished" if done else "interrupted", stopped)
        if self._held is not None:
            self._held.close()

    def _participants(self, round: int, down: int) -> tuple[list[Participant], int, int]:
        """Who took part in a round, how many were invited last, and how many were accepted."""
        mine = assignments.c.round == round
        if not self._plan.schedule.lockstep:
            mine = (assignments.c.counted == round) | (mine & (assignments.c.state != "accepted"))
            mine &= assignments.c.state != "open"
        rows = sorted(self._store.rows(sa.select(assignments).where(mine)), key=_place)
        sent = sa.select(answers.c.assignment, sa.func.sum(answers.c.size).label("size"))
        ids = [row["id"] for row in rows]
        sizes = {
            row["assignment"]: int(row["size"])
            for row in self._store.rows(
                sent.where(answers.c.assignment.in_(ids)).group_by(answers.c.assignment)
            )
        }
        parts = [
            Participant(
                row["site"],
                OUTCOMES[row["state"]],
                row["told"] if self._plan.several else down,
                sizes.get(row["id"], row["size"] or 0),
            )
            for row in rows
        ]
        accepted = sum(row["counted"] == round for row in rows)
        last = max((int(row["id"].split(".")[1]) for row in rows), default=0)
        lockstep = self._plan.schedule.lockstep
        invited = sum(int(row["id"].split(".")[1]) == last or not lockstep for row in rows)
        return parts, invited, accepted

    def _refusals(self) -> list[tuple[int, str]]:
        """Why updates were refused, sites lost and attempts abandoned, as the database has it."""
        bad = assignments.c.state.in_(("refused", "lost"))
        gone = sa.select(assignments.c.round, assignments.c.site, assignments.c.reason).where(bad)
        over = sa.select(rounds.c.round, rounds.c.reason).where(rounds.c.state == "abandoned")
        found = [
            (row["round"], f"{row['site']}: {row['reason']}") for row in self._store.rows(gone)
        ]
        found += [(row["round"], f"abandoned: {row['reason']}") for row in self._store.rows(over)]
        return sorted(found, key=lambda each: each[0])

    def _untold(self) -> list[dict[str, Any]]:
        """The lines of those refusals that the folder does not have yet."""
        new, self._kept = self.refusals[self._kept :], len(self.refusals)
        return [{"round": round, "reason": reason} for round, reason in new]

    def _append(self, lines: Mapping[str, Sequence[Any]]) -> None:
        assert self._folder is not None
        for name, each in lines.items():
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.writelines(_line(line) for line in each)

    def _config(self) -> dict[str, Any]:
        plan = {**describe(self._plan), "kind": "atoll.Federation"}
        identity = {"plan": plan, "seed": self._seed, "id": self._store.setting("id")}
        project = self._store.setting("project") or "federation"
        return {
            "identity": digest(identity),
            "seed": self._seed,
            "rounds": self._plan.schedule.rounds,
            "data": {"name": project, "served": True},
            "plan": plan,
        }

    def _status(self, status: str, stopped: str = "") -> None:
        assert self._folder is not None
        write_status(self._folder, status, stopped)


def _place(row: Row) -> tuple[int, ...]:
    return tuple(int(part) for part in row["id"].split("."))


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
