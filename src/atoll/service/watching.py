"""Watching: a served federation as the live page's source.

Closed rounds do not change, so each is read once and kept; what is open is asked of the conductor.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from atoll.page.source import Row, State, Unknown
from atoll.rounds.coordinator import Phase
from atoll.service.conductor import Conductor
from atoll.service.desk import Desk
from atoll.service.tables import assignments, rounds
from atoll.tracking.folder import environment

RUN = "federation"
FAILURES = 50
#: Rounds read between two turns of the event loop.
PIECE = 20
OUTCOMES = {
    "accepted": "accepted", "refused": "malformed", "lost": "lost", "spared": "no longer needed",
    "open": "at work",
}  # fmt: skip


class Watching:
    """The rounds and sites of the federation that this process leads."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._of: Conductor | None = None
        self._reading = asyncio.Lock()
        self._forget()

    def _forget(self) -> None:
        self._rows: list[Row] = []
        #: Bytes of the model that each round's sites were sent.
        self._sizes: list[int] = []
        self._failures: list[dict[str, Any]] = []
        self._failed = 0
        self._totals: dict[str, dict[str, int]] = defaultdict(
            lambda: {"accepted": 0, "missed": 0, "up": 0, "down": 0, "last": 0}
        )

    async def runs(self) -> Sequence[dict[str, Any]]:
        conductor = self._desk.leading()
        return [{"id": RUN, "name": self._desk.project, "status": _status(conductor)}]

    async def about(self, run: str) -> dict[str, Any]:
        store = self._leading(run).store
        identity = store.setting("identity") or {}
        return {
            "id": RUN, "name": self._desk.project, "kind": "federation",
            "configuration": {"seed": identity.get("seed"), **(store.setting("plan") or {})},
            "environment": {k: v for k, v in environment().items() if k != "arguments"},
        }  # fmt: skip

    async def since(self, run: str, round: int) -> tuple[Sequence[Row], State]:
        conductor = await self._caught_up(run)
        return self._rows[max(round, 0) :], self._state(conductor)

    async def clients(self, run: str) -> Sequence[dict[str, Any]]:
        conductor = await self._caught_up(run)
        found = []
        for site in conductor.store.sites():
            name = site["name"]
            if site["role"] == "site" or name in self._totals:
                status = "at work" if name in conductor.open else site["status"]
                seen = conductor.members.seen.get(name, site["seen"])
                found.append(
                    {
                        "name": name, "status": status, "seen": seen, "examples": site["examples"],
                        "metrics": {}, **self._totals[name],
                    }
                )  # fmt: skip
        return found

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        conductor = await self._caught_up(run)
        if not 1 <= round <= len(self._rows):
            raise Unknown(f"round {round} has not closed")
        size = self._sizes[round - 1]
        return [
            {
                "client": part["site"], "outcome": OUTCOMES[part["state"]], "down": size,
                "up": part["size"],
            }
            for part in _parts(conductor, round)
        ]  # fmt: skip

    def _leading(self, run: str) -> Conductor:
        if run != RUN:
            raise Unknown(f"there is no run {run!r}")
        return self._desk.leading()

    async def _caught_up(self, run: str) -> Conductor:
        """The conductor, when every round that it has closed is here."""
        conductor = self._leading(run)
        async with self._reading:
            if conductor is not self._of:
                self._of = conductor
                self._forget()
            while len(self._rows) < conductor.version["version"]:
                for _ in range(PIECE):
                    if len(self._rows) < conductor.version["version"]:
                        self._take(conductor, len(self._rows) + 1)
                await asyncio.sleep(0)
        return conductor

    def _take(self, conductor: Conductor, round: int) -> None:
        """Read one closed round."""
        query = sa.select(rounds).where(rounds.c.round == round).order_by(rounds.c.attempt)
        attempts = conductor.store.rows(query)
        closed = attempts[-1]
        record, parts = json.loads(closed["record"]), _parts(conductor, round)
        size = int(record.get("broadcast", 0))
        for part in parts:
            total, good = self._totals[part["site"]], part["state"] == "accepted"
            total["accepted" if good else "missed"] += 1
            total["up"] += part["size"]
            total["down"] += size
            if good:
                total["last"] = round
            elif part["state"] in ("refused", "lost"):
                self._fail(round, f"{part['site']}: {part['reason'] or part['state']}")
        for attempt in attempts[:-1]:
            self._fail(round, f"abandoned: {attempt['reason']}")
        self._sizes.append(size)
        self._rows.append(
            {
                "round": round, "metrics": record.get("metrics", {}),
                "measurements": record.get("measurements", {}), "invited": len(parts),
                "accepted": len(record.get("accepted", ())), "attempts": len(attempts),
                "up": record.get("bytes_up"), "down": size * len(parts),
                "seconds": closed["ended"] - attempts[0]["opened"],
                "phases": record.get("phases", {}), "clock": None,
            }
        )  # fmt: skip

    def _fail(self, round: int, text: str) -> None:
        self._failed += 1
        self._failures.append({"round": round, "text": text})
        del self._failures[:-FAILURES]

    def _state(self, conductor: Conductor) -> State:
        # What goes wrong in the open round is not in a closed one yet.
        query = sa.select(assignments).where(
            assignments.c.round == conductor.version["version"] + 1,
            assignments.c.state.in_(("refused", "lost")),
        )
        now = [
            {"round": each["round"], "text": f"{each['site']}: {each['reason'] or each['state']}"}
            for each in conductor.store.rows(query)
        ]
        return {
            "status": _status(conductor), "total": conductor.plan.schedule.rounds,
            "phase": "" if conductor.done else str(conductor.coordinator.phase),
            "waiting": conductor.waiting, "sites": len(conductor.members.names),
            "at_work": sorted(conductor.open), "failures": [*self._failures, *now][-FAILURES:],
            "failed": self._failed + len(now),
        }  # fmt: skip


def _parts(conductor: Conductor, round: int) -> Sequence[Any]:
    """Everyone whose update went into a round, or who was asked for it in vain."""
    mine = (assignments.c.round == round) & (assignments.c.state != "accepted")
    query = sa.select(assignments).where((assignments.c.counted == round) | mine)
    return conductor.store.rows(query.order_by(assignments.c.site, assignments.c.id))


def _status(conductor: Conductor) -> str:
    if conductor.coordinator.phase is Phase.FAILED:
        return "failed"
    if conductor.version["version"] >= conductor.plan.schedule.rounds:
        return "finished"
    return "stopped" if conductor.stopping else "running"
