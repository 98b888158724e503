"""The audit log: every decision, append-only, each line's digest covering all lines before it.

A line that is changed, removed from the middle or put in later breaks the chain from there on.
Only cutting off the end leaves no trace: so `verify` says the last digest, to be noted elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import sqlalchemy as sa

from atoll.service.storage.tables import audit

GENESIS = sha256(b"atoll audit").hexdigest()


def append(connection: sa.Connection, actor: str, event: str, detail: Mapping[str, Any]) -> None:
    """Add a line, in the transaction of the connection."""
    last = connection.execute(
        sa.select(audit.c.number, audit.c.digest).order_by(audit.c.number.desc()).limit(1)
    ).first()
    number, before = (last.number + 1, last.digest) if last else (1, GENESIS)
    now = round(time.time(), 3)
    text = json.dumps(detail, sort_keys=True, separators=(",", ":"))
    connection.execute(
        audit.insert().values(
            number=number,
            time=now,
            actor=actor,
            event=event,
            detail=text,
            digest=link(before, number, now, actor, event, text),
        )
    )


def link(before: str, number: int, at: float, actor: str, event: str, detail: str) -> str:
    """The digest of a line after the line with digest `before`."""
    text = json.dumps([before, number, at, actor, event, detail], separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Line:
    """One decision as it was logged."""

    number: int
    time: float
    actor: str
    event: str
    detail: str
    digest: str


def lines(connection: sa.Connection) -> Iterator[Line]:
    """The log from its beginning."""
    query = sa.select(audit).order_by(audit.c.number)
    for row in connection.execution_options(yield_per=1000).execute(query):
        yield Line(row.number, row.time, row.actor, row.event, row.detail, row.digest)


def verify(connection: sa.Connection) -> tuple[int, str, str]:
    """How many lines hold, the digest of the last of them, and what is wrong after; or empty."""
    before, count = GENESIS, 0
    for line in lines(connection):
        if line.number != count + 1:
            return count, before, f"line {count + 1} is missing"
        found = link(before, line.number, line.time, line.actor, line.event, line.detail)
        if found != line.digest:
            return count, before, f"line {line.number} was changed, or a line before it"
        before, count = line.digest, line.number
    return count, before, ""
