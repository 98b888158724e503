"""The store: durable state behind short transactions, and the lease of the process that leads.

A transaction is on disk when it returns (SQLite in WAL mode with full synchronisation, PostgreSQL
with its own). Every one that changes something begins by proving that this process still leads.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from atoll.errors import AtollError, ConfigurationError, pip_line
from atoll.service.storage import tables
from atoll.service.storage.audit import append

LEASE_SECONDS = 10.0
#: The advisory lock of every change on PostgreSQL ("atoll").
CHAIN = 0x61746F6C6C
Row = Mapping[str, Any]


class NotLeading(AtollError):
    """Another process leads the federation."""


class Store:
    """One process's hold on a federation's tables.

    Args:
        url: a SQLAlchemy URL, e.g. "sqlite:///my-federation/atoll.db" or "postgresql://...".
        lease_seconds: for how long a lease holds that is not renewed.
    """

    def __init__(self, url: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.lease_seconds = lease_seconds
        self.holder = f"{_machine()}:{os.getpid()}:{secrets.token_hex(4)}"
        #: Another's lease as it was last seen to change, and since when.
        self._watched: tuple[str, float] | None = None
        self._unchanged_since = 0.0
        self._engine = engine_for(url)
        try:
            with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    # Two processes that start together must not both bring it up to date.
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CHAIN)))
                tables.migrate(connection)
        except sa.exc.OperationalError as error:
            raise ConfigurationError(f"the database cannot be opened: {said_by(error)}") from None
        self._reader = self._engine.connect().execution_options(reading=True)

    def close(self) -> None:
        """Let go of the database."""
        self._reader.close()
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read with; what it sees is of one moment."""
        try:
            yield self._reader
        except sa.exc.DBAPIError:
            self._reader.invalidate()
            raise
        finally:
            self._reader.rollback()

    @contextmanager
    def apart(self) -> Iterator[sa.Connection]:
        """A connection of its own to read with, for another thread."""
        with self._engine.connect().execution_options(reading=True) as connection:
            yield connection

    @contextmanager
    def change(self, *, leading: bool = True) -> Iterator[Change]:
        """A transaction: all of it, on disk, or nothing."""
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                # One change at a time, as SQLite has it: the audit log is a chain.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CHAIN)))
            if leading and not self._renew(connection):
                raise NotLeading("another process leads this federation now")
            yield Change(connection)

    def lead(self) -> bool:
        """Take or keep the lease; False while another process holds it."""
        try:
            return self._lead()
        except sa.exc.IntegrityError:
            return False  # another process was as quick

    def _lead(self) -> bool:
        with self._engine.begin() as connection:
            if self._renew(connection):
                return True
            row = connection.execute(sa.select(tables.lease)).mappings().first()
            now = time.time()
            if row is None:
                values = {"name": "leader", "holder": self.holder, "until": now}
                connection.execute(tables.lease.insert().values(**values))
            elif self._lapsed(row) or _dead(row["holder"]):
                taken = connection.execute(
                    tables.lease.update()
                    .where(
                        tables.lease.c.holder == row["holder"],
                        tables.lease.c.until == row["until"],
                    )
                    .values(holder=self.holder, until=now + self.lease_seconds)
                )
                return taken.rowcount == 1
            else:
                return False
            return self._renew(connection)

    def _lapsed(self, row: sa.RowMapping) -> bool:
        """Whether another's lease was not renewed for as long as it holds, by this clock alone."""
        # Its `until` is by the holder's clock, which may be an hour off either way.
        now, seen = time.monotonic(), (row["holder"], row["until"])
        if seen != self._watched:
            self._watched, self._unchanged_since = seen, now
        return now - self._unchanged_since > self.lease_seconds

    def led(self) -> bool:
        """Whether some process leads, as far as the lease tells."""
        row = self._first(sa.select(tables.lease))
        return row is not None and row["until"] > time.time() and not _dead(row["holder"])

    def resign(self) -> None:
        """Let another process lead at once."""
        with self._engine.begin() as connection:
            mine = tables.lease.c.holder == self.holder
            connection.execute(tables.lease.delete().where(mine))

    def _renew(self, connection: sa.Connection) -> bool:
        renewed = connection.execute(
            tables.lease.update()
            .where(tables.lease.c.holder == self.holder)
            .values(until=time.time() + self.lease_seconds)
        )
        return renewed.rowcount == 1

    def identify(self) -> str:
        """The federation's own random name, made once."""
        known = self.setting("id")
        if known is None:
            known = secrets.token_hex(16)
            with self.change(leading=False) as change:
                change.set("id", known)
        return str(known)

    def setting(self, name: str) -> Any:
        """A single value, None if it was never set."""
        with self.reading() as connection:
            return _setting(connection, name)

    def site(self, name: str) -> Row | None:
        """What is known of a site."""
        return self._first(sa.select(tables.sites).where(tables.sites.c.name == name))

    def sites(self) -> Sequence[Row]:
        """All sites, by name."""
        return self.rows(sa.select(tables.sites).order_by(tables.sites.c.name))

    def assignment(self, id: str) -> Row | None:
        """One assignment."""
        return self._first(sa.select(tables.assignments).where(tables.assignments.c.id == id))

    def upload(self, id: str) -> Row | None:
        """One upload that has not been delivered yet."""
        return self._first(sa.select(tables.uploads).where(tables.uploads.c.id == id))

    def version(self, number: int | None = None) -> Row | None:
        """A model version; None for the latest."""
        query = sa.select(tables.versions).order_by(tables.versions.c.version.desc()).limit(1)
        if number is not None:
            query = query.where(tables.versions.c.version == number)
        return self._first(query)

    def rows(self, query: sa.Executable) -> Sequence[Row]:
        """All rows of a query."""
        with self.reading() as connection:
            result = connection.execute(query)
            names = tuple(result.keys())
            return [dict(zip(names, row, strict=True)) for row in result]

    def _first(self, query: sa.Select[Any]) -> Row | None:
        with self.reading() as connection:
            row = connection.execute(query).mappings().first()
            return None if row is None else dict(row)


class Change:
    """One transaction of a store."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    def run(self, statement: sa.Executable) -> int:
        """Execute; how many rows it touched."""
        return int(self.connection.execute(statement).rowcount)

    def many(self, statement: sa.Executable, rows: list[dict[str, Any]]) -> None:
        """Execute once for each row."""
        if rows:
            self.connection.execute(statement, rows)

    def setting(self, name: str) -> Any:
        """A single value, None if it was never set."""
        return _setting(self.connection, name)

    def set(self, name: str, value: Any) -> None:
        """Keep a single value."""
        text = json.dumps(value, separators=(",", ":"))
        mine = tables.settings.c.name == name
        if not self.run(tables.settings.update().where(mine).values(value=text)):
            self.run(tables.settings.insert().values(name=name, value=text))

    def audit(self, actor: str, event: str, **detail: Any) -> None:
        """Append a decision to the audit log, in this transaction."""
        append(self.connection, actor, event, detail)


def _setting(connection: sa.Connection, name: str) -> Any:
    query = sa.select(tables.settings.c.value).where(tables.settings.c.name == name)
    text = connection.execute(query).scalar()
    return None if text is None else json.loads(text)


def engine_for(url: str) -> sa.Engine:
    """A database by its URL."""
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigurationError(
                f"the database must be SQLite or PostgreSQL, not {parsed.get_backend_name()}"
            )
        engine = sa.create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    except sa.exc.ArgumentError:
        raise ConfigurationError(
            "the database's URL cannot be read; write e.g. postgresql://user@host/name"
        ) from None
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"PostgreSQL needs the package {error.name!r}; run: {pip_line('atoll[postgres]')}"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        _prepare_sqlite(engine)
    return engine


def _prepare_sqlite(engine: sa.Engine) -> None:
    """Write-ahead log, full synchronisation, and transactions that never wait for each other."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _machine() -> str:
    """Where this process runs, so that its number means something: boot and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def said_by(error: sa.exc.DBAPIError) -> str:
    """What the database itself says of an error, in one line."""
    return str(error.orig).strip().splitlines()[0]


def _dead(holder: str) -> bool:
    """Whether the process that held the lease was on this machine and is gone."""
    machine, pid, _ = holder.rsplit(":", 2)
    # Where it cannot be known to be the same machine and container, only time tells.
    if not machine.startswith("/") or machine != _machine() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
