"""Visits of the live page: tickets that are good once, and the cookies that they are changed for.
Both are kept as digests, so that a restart ends no visit and a stolen database opens none."""

from __future__ import annotations

import secrets
import time

import sqlalchemy as sa

from atoll.protocol.identity import token_digest
from atoll.service.storage.database import Change, Row, Store
from atoll.service.storage.tables import visits

TICKET_SECONDS, VISIT_SECONDS = 300.0, 12 * 3600.0


def issue(change: Change, name: str, key: str) -> str:
    """A ticket for one visit; `key` is the identity's, or empty for the server's own operator."""
    return _add(change, "ticket", name, key, TICKET_SECONDS)


def exchange(change: Change, ticket: str) -> tuple[str, str] | None:
    """Who brings a ticket, and the secret of their visit; None if it was used or is too old."""
    mine = (visits.c.digest == token_digest(ticket)) & (visits.c.kind == "ticket")
    row = change.connection.execute(sa.select(visits).where(mine)).mappings().first()
    if row is None or row["expires"] < time.time() or change.run(visits.delete().where(mine)) != 1:
        return None
    return row["name"], _add(change, "visit", row["name"], row["key"], VISIT_SECONDS)


def end(change: Change, secret: str) -> None:
    """End one visit."""
    change.run(visits.delete().where(visits.c.digest == token_digest(secret)))


def end_all(change: Change, name: str) -> None:
    """End all visits of an identity, and its tickets; the server's operator has no key."""
    change.run(visits.delete().where(visits.c.name == name, visits.c.key != ""))


def find(store: Store, kind: str, secret: str) -> Row | None:
    """What is known of a ticket or a visit that is still good."""
    if not secret:
        return None
    mine = (visits.c.digest == token_digest(secret)) & (visits.c.kind == kind)
    found = store.rows(sa.select(visits).where(mine, visits.c.expires >= time.time()))
    return found[0] if found else None


def welcome(store: Store, secret: str) -> bool:
    """Whether a cookie's visit goes on: not too old, and of someone who was not revoked since."""
    found = find(store, "visit", secret)
    if found is None or not found["key"]:
        return found is not None
    row = store.site(found["name"])
    return (
        row is not None
        and row["status"] == "active"
        and row["key"] == found["key"]
        and row["role"] in ("analyst", "admin")
    )


def _add(change: Change, kind: str, name: str, key: str, seconds: float) -> str:
    secret, now = secrets.token_urlsafe(32), time.time()
    change.run(visits.delete().where(visits.c.expires < now))
    change.run(
        visits.insert().values(
            digest=token_digest(secret), kind=kind, name=name, key=key, expires=now + seconds
        )
    )
    return secret
