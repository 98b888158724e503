"""Operations: what operators see of a federation and do to it, by state folder and over HTTP alike.

To look takes the store, to act a transaction and the name of who acts. What only the process that
leads can know is given as an argument; elsewhere it is None, under the same key.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from atoll.errors import ConfigurationError
from atoll.rounds.coordinator import Phase
from atoll.service.storage import tables, visits
from atoll.service.storage.database import Change, Store
from atoll.service.storage.folder import is_name

#: Rounds that one answer tells of; the next ones are had by `since`.
PAGE = 500
SHOWN = ("name", "role", "status", "joined", "examples", "seen")


class UnknownSite(ConfigurationError):
    """Nobody of this name has joined or was invited."""


def status(store: Store, project: str) -> dict[str, Any]:
    """How a federation stands, and what the next round waits for, in words."""
    version, state = store.version(), store.setting("coordinator") or {}
    leads = tables.lease.c.until > time.time()
    led = bool(store.rows(sa.select(tables.lease.c.holder).where(leads)))
    phase = state.get("phase", str(Phase.IDLE))
    if store.setting("stop") and phase not in (Phase.DONE, Phase.FAILED):
        phase = "stopping" if led else "stopped"
    member = (tables.sites.c.status == "active") & (tables.sites.c.role == "site")
    return {
        "project": project,
        "server": "running" if led else "not running",
        "round": version["version"] if version else 0,
        "rounds": (store.setting("plan") or {}).get("schedule", {}).get("rounds"),
        "phase": phase,
        "waiting_for": (store.setting("waiting") or None) if led else None,
        "sites": len(store.rows(sa.select(tables.sites.c.name).where(member))),
        "at_work": _at_work(state),
        "model": version["model"] if version else None,
    }


def _at_work(state: Mapping[str, Any]) -> list[str]:
    """Who owes an answer, by the coordinator's saved state."""
    if "buffer" in state:  # of an asynchronous schedule
        return sorted(client for client, _ in state["open"].values())
    if state.get("phase") != Phase.OPEN:
        return []
    gone = {*state["accepted"], *state["lost"]}
    return sorted(client for id, client in state["open"].items() if id not in gone)


def rounds(store: Store, since: int = 0) -> list[dict[str, Any]]:
    """The attempts at the first `PAGE` rounds after round `since`, oldest first."""
    here = tables.rounds.c.round.between(since + 1, since + PAGE)
    query = sa.select(tables.rounds).where(here)
    rows = store.rows(query.order_by(tables.rounds.c.round, tables.rounds.c.attempt))
    return [{**row, "record": json.loads(row["record"])} for row in rows]


def sites(store: Store) -> list[dict[str, Any]]:
    """Who has joined, was revoked or is invited, by name; who was invited anew is invited."""
    known = {row["name"]: {name: row[name] for name in SHOWN} for row in store.sites()}
    good = tables.tokens.c.used.is_(None) & (tables.tokens.c.expires > time.time())
    for token in store.rows(sa.select(tables.tokens).where(good)):
        name, role = token["name"], token["role"]
        if name not in known or known[name]["status"] != "active":
            known[name] = {**dict.fromkeys(SHOWN), "name": name, "role": role, "status": "invited"}
    # Python's order, which no database's collation changes.
    return [known[name] for name in sorted(known)]


def revoke(change: Change, who: str, name: str) -> None:
    """Nobody comes in by this name from now on: not its key, its invitation or its browser."""
    if not is_name(name):
        raise UnknownSite(f"there is no site {name!r}")
    mine, unused = tables.sites.c.name == name, tables.tokens.c.used.is_(None)
    joined = change.run(tables.sites.update().where(mine).values(status="revoked"))
    invited = change.run(tables.tokens.delete().where(tables.tokens.c.name == name, unused))
    if not joined + invited:
        raise UnknownSite(f"there is no site {name!r}")
    visits.end_all(change, name)
    known = change.setting("meaning")
    if known is not None and known["site"] == name:
        change.set("meaning", None)  # the next site says anew what the data mean
    change.audit(who, "revoked", site=name)


def stop(change: Change, who: str) -> None:
    """No more rounds until the federation is served again; to stop it twice changes nothing."""
    if change.setting("stop"):
        return
    change.set("stop", True)
    change.audit(who, "stop")


def ticket(change: Change, name: str, key: str = "") -> str:
    """A secret that opens the live page once, for the identity of this key; without one, for the
    operator of the server itself."""
    change.audit(name, "asked for the page")
    return visits.issue(change, name, key)
