"""Operations: what operators see of a federation and do to it, by state folder and over HTTP alike.

To look takes the store, to act a transaction and the name of who acts. What only the process that
leads can know is given as an argument; elsewhere it is None, under the same key.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from atoll.errors import ConfigurationError
from atoll.rounds.coordinator import Phase
from atoll.service import meanings
from atoll.service.measuring import latest
from atoll.service.storage import tables, visits
from atoll.service.storage.database import Change, Store
from atoll.service.storage.folder import is_name
from atoll.tracking.record import human_seconds

#: Rounds that one answer tells of; the next ones are had by `since`.
PAGE = 500
#: So many of those who owe an answer are named with their times.
OWING = 5
SHOWN = ("name", "role", "status", "joined", "examples", "seen")


class UnknownSite(ConfigurationError):
    """Nobody of this name has joined or was invited."""


def status(store: Store, project: str) -> dict[str, Any]:
    """How a federation stands, what it waits for, in words, and until when.

    `until` is the time (seconds since 1970) at which the wait ends by itself, None if only who is
    waited for can end it; a site that owes an answer is given up after `silence` seconds of it.
    """
    version, state = store.version(), store.setting("coordinator") or {}
    led = store.led()
    phase = state.get("phase", str(Phase.IDLE))
    if store.setting("stop") and phase not in (Phase.DONE, Phase.FAILED):
        phase = "stopping" if led else "stopped"
    member = (tables.sites.c.status == "active") & (tables.sites.c.role == "site")
    at_work = _at_work(state)
    waiting = (store.setting("waiting") or {}) if led else {}
    for_whom = _owing(store, at_work) if at_work and led else waiting.get("for")
    return {
        "project": project,
        "server": "running" if led else "not running",
        "round": version["version"] if version else 0,
        "rounds": (store.setting("plan") or {}).get("schedule", {}).get("rounds"),
        "phase": phase,
        "waiting_for": for_whom or None,
        "until": waiting.get("until"),
        "silence": waiting.get("silence"),
        "sites": len(store.rows(sa.select(tables.sites.c.name).where(member))),
        "at_work": at_work,
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


def _owing(store: Store, names: Sequence[str]) -> str:
    """Some of those who owe an answer: since when, and when they were last heard of."""
    owed = tables.assignments.c
    query = sa.select(owed.site, owed.opened, tables.sites.c.seen).join_from(
        tables.assignments, tables.sites, tables.sites.c.name == owed.site
    )
    some = names[:OWING]
    rows = store.rows(query.where(owed.state == "open", owed.site.in_(some)).order_by(owed.site))
    now = time.time()
    said = [
        f"{row['site']} (asked {human_seconds(max(now - row['opened'], 0))} ago, heard of "
        f"{human_seconds(max(now - row['seen'], 0))} ago)"
        for row in rows
    ]
    more = len(names) - len(some)
    return ", ".join(said) + (f" and {more} more" if more else "")


def rounds(store: Store, since: int = 0) -> list[dict[str, Any]]:
    """The attempts at the first `PAGE` rounds after round `since`, oldest first."""
    here = tables.rounds.c.round.between(since + 1, since + PAGE)
    query = sa.select(tables.rounds).where(here)
    rows = store.rows(query.order_by(tables.rounds.c.round, tables.rounds.c.attempt))
    return [{**row, "record": json.loads(row["record"])} for row in rows]


def sites(store: Store) -> list[dict[str, Any]]:
    """Who has joined, was revoked or is invited, by name; who was invited anew is invited.

    With what each has said last of how good a model is on rows of its own.
    """
    known = {row["name"]: {name: row[name] for name in SHOWN} for row in store.sites()}
    good = tables.tokens.c.used.is_(None) & (tables.tokens.c.expires > time.time())
    for token in store.rows(sa.select(tables.tokens).where(good)):
        name, role = token["name"], token["role"]
        if name not in known or known[name]["status"] != "active":
            known[name] = {**dict.fromkeys(SHOWN), "name": name, "role": role, "status": "invited"}
    told = {row["site"]: row for row in latest(store)}
    for name, row in known.items():
        said = told.get(name)
        row["measured"] = said and {key: said[key] for key in ("round", "examples", "figures")}
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
    meanings.forget(change, name)
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
