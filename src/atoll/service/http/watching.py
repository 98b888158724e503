"""A served federation as the live page's source: its history, and what goes on now.

What grows with the federation is added up and read in another thread, on a connection of its own:
whoever watches must not hold up the sites.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from atoll.rounds.coordinator import Phase
from atoll.service.http.auth import Endpoints
from atoll.service.loop import FederationLoop
from atoll.service.storage.tables import sites
from atoll.tracking.folder import environment
from atoll.tracking.record import Closed
from atoll.view.page.source import State, Totals, Unknown, failures, part, row

RUN = "federation"


class ServedSource:
    """The rounds and sites of the federation that this process leads."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._of: FederationLoop | None = None
        self._totals = Totals()
        self._adding = asyncio.Lock()

    async def runs(self) -> Sequence[dict[str, Any]]:
        status = _status(self._endpoints.leading())
        return [{"id": RUN, "name": self._endpoints.project, "status": status}]

    async def about(self, run: str) -> dict[str, Any]:
        store = self._leading(run).store
        identity = store.setting("identity") or {}
        return {
            "id": RUN, "name": self._endpoints.project, "kind": "federation",
            "configuration": {"seed": identity.get("seed"), **(store.setting("plan") or {})},
            "environment": {k: v for k, v in environment().items() if k != "arguments"},
        }  # fmt: skip

    async def since(self, run: str, round: int) -> tuple[Sequence[dict[str, Any]], State]:
        loop = self._leading(run)
        return [row(each, served=True) for each in _closed(loop)[max(round, 0) :]], _state(loop)

    async def clients(self, run: str) -> Sequence[dict[str, Any]]:
        loop = self._leading(run)
        async with self._adding:
            if loop is not self._of:
                self._of, self._totals = loop, Totals()
            new = _closed(loop)[self._totals.rounds :]
            found = await asyncio.to_thread(_clients, loop, self._totals, new)
        heard = loop.members.heard
        for each in found:
            each["seen"] = heard.get(each["name"], each["seen"])
            each["status"] = "at work" if each["name"] in loop.open else each["status"]
        return found

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        for closed in _closed(self._leading(run)):
            if closed.record.round == round:
                return [part(each) for each in closed.participants]
        raise Unknown(f"round {round} has not closed")

    def _leading(self, run: str) -> FederationLoop:
        if run != RUN:
            raise Unknown(f"there is no run {run!r}")
        return self._endpoints.leading()


def _closed(loop: FederationLoop) -> Sequence[Closed]:
    """The rounds that are known to have closed: the last one may be about to."""
    return loop.history.closed[: loop.version["version"]]


def _clients(loop: FederationLoop, totals: Totals, new: Sequence[Closed]) -> list[dict[str, Any]]:
    """Every site, and whoever else took part, with what the rounds add up to."""
    totals.add(new)
    with loop.store.apart() as connection:
        known = connection.execute(sa.select(sites).order_by(sites.c.name)).mappings().all()
    return [
        {
            **{name: site[name] for name in ("name", "status", "seen", "examples")},
            **(totals.of[site["name"]]), "metrics": {},
        }
        for site in known
        if site["role"] == "site" or site["name"] in totals.of
    ]  # fmt: skip


def _state(loop: FederationLoop) -> State:
    return {
        "epoch": str(loop.store.setting("id") or "")[:8], "status": _status(loop),
        "total": loop.plan.schedule.rounds,
        "phase": "" if loop.done else str(loop.coordinator.phase),
        "waiting": loop.waiting, "sites": len(loop.members.names), "at_work": len(loop.open),
        **failures(loop.history.refusals),
    }  # fmt: skip


def _status(loop: FederationLoop) -> str:
    if loop.coordinator.phase is Phase.FAILED:
        return "failed"
    if loop.version["version"] >= loop.plan.schedule.rounds:
        return "finished"
    return "stopped" if loop.stopping else "running"
