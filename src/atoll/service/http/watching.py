"""A served federation as the live page's source.

Closed rounds do not change, so each is read once and kept. The database is read in another thread,
on a connection of its own: whoever watches must not hold up the sites.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from atoll.rounds.coordinator import Phase
from atoll.rounds.schedules import Buffered
from atoll.service.http.auth import Endpoints
from atoll.service.loop import FederationLoop
from atoll.service.storage.tables import assignments, rounds, sites, versions
from atoll.tracking.folder import environment
from atoll.view.page.source import Row, State, Unknown

RUN = "federation"
FAILURES = 50
#: Seconds for which totals and failures are good; the larger the federation, the longer.
FRESH = 2.0
OUTCOMES = {
    "accepted": "accepted", "refused": "malformed", "lost": "lost", "spared": "no longer needed",
    "open": "at work",
}  # fmt: skip


class ServedSource:
    """The rounds and sites of the federation that this process leads."""

    def __init__(self, desk: Endpoints) -> None:
        self._desk = desk
        self._of: FederationLoop | None = None
        self._reading = asyncio.Lock()
        self._forget()

    def _forget(self) -> None:
        self._rows: list[Row] = []
        self._failures: list[dict[str, Any]] = []
        self._failed = 0
        self._clients: list[dict[str, Any]] = []
        self._size: int | None = None
        self._good_until, self._status = 0.0, ""

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
        heard = conductor.members.heard
        return [
            {
                **each,
                "seen": heard.get(each["name"], each["seen"]),
                "status": "at work" if each["name"] in conductor.open else each["status"],
            }
            for each in self._clients
        ]

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        conductor = await self._caught_up(run)
        if not 1 <= round <= len(self._rows):
            raise Unknown(f"round {round} has not closed")
        mine = (assignments.c.round == round) & (assignments.c.state != "accepted")
        query = sa.select(assignments).where((assignments.c.counted == round) | mine)
        found = await asyncio.to_thread(
            _rows, conductor, query.order_by(assignments.c.site, assignments.c.id)
        )
        return [
            {
                "client": part["site"], "outcome": OUTCOMES[part["state"]], "down": self._size,
                "up": part["size"],
            }
            for part in found
        ]  # fmt: skip

    def _leading(self, run: str) -> FederationLoop:
        if run != RUN:
            raise Unknown(f"there is no run {run!r}")
        return self._desk.leading()

    async def _caught_up(self, run: str) -> FederationLoop:
        """The conductor, when every round that it has closed is here."""
        conductor = self._leading(run)
        async with self._reading:
            if conductor is not self._of:
                self._of = conductor
                self._forget()
            version = conductor.version["version"]
            if len(self._rows) < version:
                self._rows += await asyncio.to_thread(self._read_rounds, conductor, version)
            # What ended it must not be missing from the last look.
            ending = _status(conductor) != self._status
            if ending or time.monotonic() >= self._good_until:
                self._status = _status(conductor)
                started = time.monotonic()
                await asyncio.to_thread(self._read_totals, conductor)
                took = time.monotonic() - started
                self._good_until = time.monotonic() + max(FRESH, 10 * took)
        return conductor

    def _read_rounds(self, conductor: FederationLoop, version: int) -> list[Row]:
        """Rounds that have closed since the last look."""
        last = len(self._rows)
        here = (rounds.c.round > last) & (rounds.c.round <= version)
        attempts = _rows(
            conductor, sa.select(rounds).where(here).order_by(rounds.c.round, rounds.c.attempt)
        )
        query = sa.select(assignments.c.round, sa.func.count().label("count"))
        asked = (assignments.c.round > last) & (assignments.c.round <= version)
        grouped = _rows(conductor, query.where(asked).group_by(assignments.c.round))
        invited = {each["round"]: each["count"] for each in grouped}
        made = sa.select(versions.c.version, versions.c.made)
        times = {
            each["version"]: each["made"]
            for each in _rows(conductor, made.where(versions.c.version.between(last, version)))
        }
        buffered = isinstance(conductor.plan.schedule, Buffered)
        found: list[Row] = []
        for number in range(last + 1, version + 1):
            mine = [each for each in attempts if each["round"] == number]
            attempts = attempts[len(mine) :]
            record = json.loads(mine[-1]["record"])
            # Without rounds in lockstep, one begins where the last one ended.
            begun = times.get(number - 1) if buffered else mine[0]["opened"]
            seconds = None if begun is None else max(0.0, mine[-1]["ended"] - begun)
            phases = dict(record.get("phases", {}))
            if seconds is not None:
                phases = {"clients": max(0.0, seconds - sum(phases.values())), **phases}
            self._size = record.get("broadcast")
            count = invited.get(number, 0)
            found.append(
                {
                    "round": number, "metrics": record.get("metrics", {}),
                    "measurements": record.get("measurements", {}), "invited": count,
                    "accepted": len(record.get("accepted", ())), "attempts": len(mine),
                    "up": record.get("bytes_up"),
                    "down": None if self._size is None else self._size * count,
                    "seconds": seconds, "phases": phases, "clock": None,
                }
            )  # fmt: skip
        return found

    def _read_totals(self, conductor: FederationLoop) -> None:
        """Who took part, and what went wrong, added up by the database."""
        parts = assignments.c
        totals = _rows(
            conductor,
            sa.select(
                parts.site, parts.state, sa.func.count().label("count"),
                sa.func.sum(parts.size).label("size"), sa.func.max(parts.counted).label("last"),
            ).group_by(parts.site, parts.state),
        )  # fmt: skip
        members = _rows(conductor, sa.select(sites).order_by(sites.c.name))
        by_site: dict[str, dict[str, Any]] = {}
        for site in members:
            by_site[site["name"]] = {
                "name": site["name"], "status": site["status"], "seen": site["seen"],
                "examples": site["examples"], "metrics": {}, "accepted": 0, "missed": 0, "up": 0,
                "down": 0, "last": 0,
            }  # fmt: skip
        took_part = set()
        for each in totals:
            known = by_site.get(each["site"])
            if known is None:
                continue
            took_part.add(each["site"])
            known["up"] += int(each["size"] or 0)
            known["down"] += each["count"] * (self._size or 0)
            if each["state"] == "accepted":
                known["accepted"] += each["count"]
                known["last"] = max(known["last"], each["last"] or 0)
            elif each["state"] != "open":
                known["missed"] += each["count"]
        ordinary = {site["name"] for site in members if site["role"] == "site"}
        self._clients = [each for n, each in by_site.items() if n in ordinary or n in took_part]
        bad = parts.state.in_(("refused", "lost"))
        latest = sa.select(parts.round, parts.site, parts.state, parts.reason).where(bad)
        gone = _rows(conductor, latest.order_by(parts.opened.desc()).limit(FAILURES))
        abandoned = _rows(
            conductor,
            sa.select(rounds).where(rounds.c.state == "abandoned").order_by(rounds.c.round),
        )
        self._failures = sorted(
            [
                {
                    "round": each["round"],
                    "text": f"{each['site']}: {each['reason'] or each['state']}",
                }
                for each in gone
            ]
            + [
                {"round": each["round"], "text": f"abandoned: {each['reason']}"}
                for each in abandoned[-FAILURES:]
            ],
            key=lambda each: each["round"],
        )[-FAILURES:]
        refused = sum(e["count"] for e in totals if e["state"] in ("refused", "lost"))
        self._failed = refused + len(abandoned)

    def _state(self, conductor: FederationLoop) -> State:
        identity = conductor.store.setting("id") or ""
        return {
            "epoch": str(identity)[:8], "status": _status(conductor),
            "total": conductor.plan.schedule.rounds,
            "phase": "" if conductor.done else str(conductor.coordinator.phase),
            "waiting": conductor.waiting, "sites": len(conductor.members.names),
            "at_work": len(conductor.open), "failures": self._failures, "failed": self._failed,
        }  # fmt: skip


def _rows(conductor: FederationLoop, query: sa.Select[Any]) -> list[dict[str, Any]]:
    with conductor.store.apart() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def _status(conductor: FederationLoop) -> str:
    if conductor.coordinator.phase is Phase.FAILED:
        return "failed"
    if conductor.version["version"] >= conductor.plan.schedule.rounds:
        return "finished"
    return "stopped" if conductor.stopping else "running"
