"""History: a served federation's rounds as the run folder that a simulation leaves.

The database is the truth. The folder is for people and for the tools that read runs: it is written
anew from the database when a server starts, and grows by a line with each round.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from atoll.core import files
from atoll.core.vectors import Vectors
from atoll.rounds.describe import describe, digest
from atoll.rounds.plan import Plan
from atoll.service.storage.database import Row, Store
from atoll.service.storage.tables import answers, assignments, rounds
from atoll.tracking.folder import LINES, environment
from atoll.tracking.record import Participant, Record

OUTCOMES = {
    "accepted": "accepted", "refused": "malformed", "lost": "lost", "spared": "no longer needed",
    "open": "no longer needed",
}  # fmt: skip


@dataclass(frozen=True)
class Closed:
    """One closed round as it is kept."""

    record: Record
    participants: Sequence[Participant]
    seconds: float
    phases: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        """Ready for JSON, for `read`."""
        parts = [[p.client, p.outcome, p.down, p.up] for p in self.participants]
        rest = {"participants": parts, "seconds": self.seconds, "phases": dict(self.phases)}
        return {**self.record.json(), **rest}

    @staticmethod
    def read(plain: Mapping[str, Any]) -> Closed:
        """A closed round from what `json` gave."""
        plain = dict(plain)
        parts = [Participant(*each) for each in plain.pop("participants")]
        seconds, phases = plain.pop("seconds"), plain.pop("phases")
        return Closed(Record.read(plain), parts, seconds, phases)

    def lines(self) -> dict[str, dict[str, Any]]:
        """What the run folder's files say of it."""
        round, plain = self.record.round, self.json()
        return {
            "rounds.jsonl": self.record.json(),
            "ledger.jsonl": {"round": round, "participants": plain["participants"]},
            "timings.jsonl": {
                "round": round, "seconds": plain["seconds"], "phases": plain["phases"],
            },
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
        self._closed: list[Closed] = []
        self._begun = 0.0

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
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._config()
        files.write_json(self._folder / "config.json", config)
        files.write_json(self._folder / "environment.json", environment())
        lines: dict[str, list[Any]] = {name: [] for name in LINES}
        for closed in self._closed:
            for name, line in closed.lines().items():
                lines[name].append(line)
        lines["refusals.jsonl"] = self._refusals(0)
        for name, each in lines.items():
            text = "".join(_line(line) for line in each)
            files.write_atomically(self._folder / name, [text.encode()])
        self._status("running")

    def made(
        self,
        round: int,
        metrics: Mapping[str, float],
        measurements: Mapping[str, float],
        down: int,
        now: float,
        phases: Mapping[str, float],
    ) -> Closed:
        """A round that has made its version, before that is known; `down` is what sites got."""
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
        closed = Closed(
            record, parts, round_to(seconds), {n: round_to(s) for n, s in shown.items()}
        )
        self._closed = [each for each in self._closed if each.record.round < round]
        self._closed.append(closed)
        return closed

    def add(self, round: int) -> None:
        """Add a round to the folder's files."""
        if self._folder is None:
            return
        for name, line in self._closed[-1].lines().items():
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(_line(line))
        with (self._folder / "refusals.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(_line(line) for line in self._refusals(round))

    def close(self, *, done: bool, model: Vectors | None = None) -> None:
        """The server leaves; with the model, if there will be no more rounds."""
        if self._folder is None:
            return
        if done and model:
            about = {"identity": self._config()["identity"]}
            files.save(self._folder / "model.safetensors", "model", about, model)
        self._status("finished" if done else "interrupted")

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
                row["site"], OUTCOMES[row["state"]], down, sizes.get(row["id"], row["size"] or 0)
            )
            for row in rows
        ]
        accepted = sum(row["counted"] == round for row in rows)
        last = max((int(row["id"].split(".")[1]) for row in rows), default=0)
        lockstep = self._plan.schedule.lockstep
        invited = sum(int(row["id"].split(".")[1]) == last or not lockstep for row in rows)
        return parts, invited, accepted

    def _refusals(self, round: int) -> list[dict[str, Any]]:
        """Why updates were refused and attempts abandoned, of one round or (0) of all."""
        bad = assignments.c.state.in_(("refused", "lost"))
        gone = sa.select(assignments.c.round, assignments.c.site, assignments.c.reason).where(bad)
        over = sa.select(rounds.c.round, rounds.c.reason).where(rounds.c.state == "abandoned")
        if round:
            gone = gone.where(assignments.c.round == round)
            over = over.where(rounds.c.round == round)
        found = [
            {"round": row["round"], "reason": f"{row['site']}: {row['reason']}"}
            for row in self._store.rows(gone)
        ]
        found += [
            {"round": row["round"], "reason": f"abandoned: {row['reason']}"}
            for row in self._store.rows(over)
        ]
        last = len(self._closed)
        return sorted((f for f in found if f["round"] <= last), key=lambda line: line["round"])

    def _config(self) -> dict[str, Any]:
        plan = describe(self._plan)
        identity = {"plan": plan, "seed": self._seed, "id": self._store.setting("id")}
        project = self._store.setting("project") or "federation"
        return {
            "identity": digest(identity),
            "seed": self._seed,
            "rounds": self._plan.schedule.rounds,
            "data": {"name": project, "served": True},
            "plan": plan,
        }

    def _status(self, status: str) -> None:
        assert self._folder is not None
        files.write_json(self._folder / "status.json", {"status": status, "time": time.time()})


def round_to(seconds: float) -> float:
    """Seconds to the microsecond, as timings are kept."""
    return math.floor(seconds * 1e6 + 0.5) / 1e6


def _place(row: Row) -> tuple[int, ...]:
    return tuple(int(part) for part in row["id"].split("."))


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
