"""The state folder of a federation: made, backed up, restored, and where its parts are.

federation.json     the project's name
ca.pem, ca-key.pem  the project's authority; whoever has the key can be the server
server.pem, ...     the server's certificate, which says its hosts, and key
metrics.token       what `/metrics` asks for
atoll.db            rounds, sites, assignments, the audit log (SQLite; or elsewhere, by URL)
blobs/              models and updates by their SHA-256
incoming/           uploads in the making
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from atoll.core.files import file_digest, write_json
from atoll.errors import CheckpointError, ConfigurationError
from atoll.protocol.certificates import (
    check_hosts,
    fingerprint,
    hosts_of,
    make_authority,
    make_server,
    write_secret,
)
from atoll.protocol.identity import Role, Token, token_digest
from atoll.service.storage.database import Change, Store
from atoll.service.storage.tables import settings, sites, tokens

NAME_LIMIT = 64
BACKUPS = 5
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class StateFolder:
    """A federation's state folder that exists."""

    path: Path

    @staticmethod
    def make(
        path: Path, project: str, hosts: Sequence[str], database: str | None = None
    ) -> StateFolder:
        """A new folder with a project authority and a server certificate for these hosts."""
        if path.exists() and any(path.iterdir()):
            raise ConfigurationError(f"{path} is not empty; choose a new folder")
        check_hosts(hosts)
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        try:
            make_authority(path, project)
            make_server(path, hosts)
            write_secret(path / "metrics.token", secrets.token_urlsafe(24).encode())
            write_json(path / "federation.json", {"project": project})
            folder = StateFolder.open(path)
            if database:
                folder.use_database(database)
        except BaseException:
            _empty(path)
            raise
        return folder

    @staticmethod
    def open(path: Path) -> StateFolder:
        """The folder, if it is one."""
        if not (path / "federation.json").is_file():
            raise ConfigurationError(
                f"{path} is not a state folder; make one with: atoll init {path}"
            )
        for name in ("blobs", "incoming"):
            (path / name).mkdir(exist_ok=True)
        return StateFolder(path)

    @property
    def project(self) -> str:
        """The project's name."""
        found = json.loads((self.path / "federation.json").read_text(encoding="utf-8"))
        return str(found["project"])

    @property
    def authority(self) -> bytes:
        """The project's certificate, PEM."""
        return (self.path / "ca.pem").read_bytes()

    @property
    def database(self) -> str:
        """The URL of the database: the one given at `serve`, or the folder's own."""
        kept = self.path / "database.url"
        if kept.exists():
            return kept.read_text(encoding="utf-8").strip()
        # As a URL: a ? or a # in a folder's name would begin another part of it.
        own = sa.URL.create("sqlite", database=str(self.path.resolve() / "atoll.db"))
        return own.render_as_string(hide_password=False)

    def url(self, port: int) -> str:
        """Where the server is reached: by the first name that its certificate is for."""
        host = hosts_of(self.path)[0]
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

    def use_database(self, url: str) -> None:
        """Keep where the database is; it may hold a password, so only the owner can read it."""
        if url == self.database:
            return
        if (self.path / "database.url").exists() or (self.path / "atoll.db").exists():
            with closing(self.store()) as store:
                if store.sites() or store.rows(sa.select(tokens.c.name).limit(1)):
                    raise ConfigurationError(
                        "this federation has sites or invitations in another database; say which "
                        "at the beginning: atoll init STATE --database URL"
                    )
        Store(url).close()  # that it can be opened, before it is kept
        write_secret(self.path / "database.url", url.encode())

    def store(self) -> Store:
        """Its tables, for a command beside the server."""
        return Store(self.database)

    def invite(self, name: str, role: Role, hours: float) -> Token:
        """A one-time token with which a site, analyst or admin of this name can join."""
        token = Token.fresh(fingerprint(self.authority))
        with closing(self.store()) as store, store.change(leading=False) as change:
            known = change.connection.execute(
                sa.select(sites.c.status).where(sites.c.name == name)
            ).scalar()
            if known == "active":
                raise ConfigurationError(
                    f"{name} has joined already; revoke it first if its key is lost: atoll revoke"
                )
            add_token(change, token.secret, name, role, time.time() + 3600 * hours)
        return token

    def backup(self, target: Path) -> int:
        """Write everything into one archive, also while the server runs; returns its bytes.

        The database is copied first and blobs after. A server that goes on may remove some that
        the copy needs; then it is begun anew.
        """
        for _ in range(BACKUPS):
            missing = self._backup(target)
            if not missing:
                return target.stat().st_size
        raise CheckpointError(
            f"rounds close faster than {target} can be written ({len(missing)} blobs were gone); "
            "stop the server for the backup"
        )

    def _backup(self, target: Path) -> set[str]:
        """One try; the digests that are missing from it."""
        if not self.database.startswith("sqlite"):
            raise ConfigurationError(
                "the database is not in the folder: back it up with its own tools (pg_dump), then "
                "the folder"
            )
        with tempfile.TemporaryDirectory(dir=self.path) as scratch:
            copy = Path(scratch) / "atoll.db"
            source = sqlite3.connect(self.path / "atoll.db")
            try:
                with sqlite3.connect(copy) as into:
                    source.backup(into)
                into.close()
            finally:
                source.close()
            partial = target.with_name(f".{target.name}.partial")
            needed, kept = _needed(copy), set()
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
                archive.add(copy, "atoll.db")
                for path in sorted(self.path.iterdir()):
                    if path.is_file() and path.suffix in (".pem", ".json", ".token"):
                        archive.add(path, path.name)
                for path in sorted((self.path / "blobs").glob("??/*")):
                    with suppress(FileNotFoundError):
                        archive.add(path, str(path.relative_to(self.path)))
                        kept.add(path.name)
            if needed - kept:
                partial.unlink()
            else:
                os.replace(partial, target)
        return needed - kept

    @staticmethod
    def restore(source: Path, path: Path) -> StateFolder:
        """A new folder from an archive that `backup` wrote."""
        if path.exists() and any(path.iterdir()):
            raise ConfigurationError(f"{path} is not empty; restore into a new folder")
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        try:
            _check_end(source)
            with tarfile.open(source) as archive:
                archive.extractall(path, filter="data")
            _check_whole(path)
        except (tarfile.TarError, OSError, sqlite3.DatabaseError) as error:
            _empty(path)
            raise CheckpointError(f"{source} cannot be restored: {error}") from error
        folder = StateFolder.open(path)
        with closing(folder.store()) as store, store.change(leading=False) as change:
            # Another federation from here on: it must not tidy up the blobs of the first.
            change.run(settings.delete().where(settings.c.name == "id"))
        return folder


def _check_end(source: Path) -> None:
    """Raise `OSError` unless an archive ends as archives do, with two blocks of zeros."""
    with source.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2 * tarfile.BLOCKSIZE))
        if file.read() != bytes(2 * tarfile.BLOCKSIZE):
            raise OSError("it is no archive, or was cut off")


def _check_whole(path: Path) -> None:
    """Raise `OSError` unless everything is there and whole that a server cannot do without."""
    for name in ("federation.json", "atoll.db", "ca.pem", "server.pem", "metrics.token"):
        if not (path / name).is_file():
            raise OSError(f"the archive is cut off: it has no {name}")
    with closing(sqlite3.connect(path / "atoll.db")) as database:
        told = database.execute("PRAGMA quick_check").fetchone()[0]
    if told != "ok":
        raise OSError(f"its database is damaged: {told}")
    for digest in _needed(path / "atoll.db"):
        blob = path / "blobs" / digest[:2] / digest
        if not blob.is_file() or file_digest(blob) != digest:
            raise OSError(f"the archive is cut off: it has no whole blob {digest[:16]}")


def _empty(folder: Path) -> None:
    """Half a folder would be in the way of the next try."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _needed(database: Path) -> set[str]:
    """Digests without which a copy of the database cannot be served."""
    with closing(sqlite3.connect(database)) as copy:
        last = copy.execute("SELECT max(version) FROM versions").fetchone()[0]
        if last is None:
            return set()
        rows = copy.execute(
            "SELECT state, broadcast, model FROM versions WHERE version = ? OR version IN "
            "(SELECT version FROM assignments WHERE state = 'open' OR counted > ?)",
            (last, last),
        ).fetchall()
        digests = {digest for row in rows for digest in row}
        waiting = copy.execute("SELECT digest FROM assignments WHERE counted > ?", (last,))
        place = copy.execute("SELECT value FROM settings WHERE name = 'blobs'").fetchone()
        if place and json.loads(place[0]):
            raise ConfigurationError(
                f"the blobs are in {json.loads(place[0])}, not in the folder: back them up there, "
                "and the folder with the server stopped"
            )
        asked = copy.execute(
            "SELECT digest FROM answers WHERE assignment IN "
            "(SELECT id FROM assignments WHERE round > ? OR counted > ?)",
            (last, last),
        ).fetchall()
        return digests | {row[0] for row in (*waiting, *asked)}


def add_token(change: Change, secret: str, name: str, role: Role, expires: float) -> None:
    """Keep the digest of a token; earlier ones for the same name that were not used are void."""
    change.run(tokens.delete().where(tokens.c.name == name, tokens.c.used.is_(None)))
    change.run(
        tokens.insert().values(
            digest=token_digest(secret), name=name, role=role, expires=expires, used=None
        )
    )
    change.audit("operator", "invited", name=name, role=role, expires=round(expires))


def is_name(name: str) -> bool:
    """Whether a site can be called this."""
    return len(name) <= NAME_LIMIT and NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """A site's name: letters, digits, and between them dots, dashes, underscores and spaces."""
    if not is_name(name):
        raise ConfigurationError(
            f"{name!r} cannot be a site's name: use up to {NAME_LIMIT} letters, digits, dots, "
            "dashes and spaces, e.g. hospital-a"
        )
    return name
