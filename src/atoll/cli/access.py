"""Access to a served federation: by its state folder, or over HTTP with an identity's folder."""

from __future__ import annotations

import getpass
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from atoll.core.files import write_json
from atoll.errors import ConfigurationError
from atoll.protocol.identity import make_key, read_identity
from atoll.service import operations
from atoll.service.storage.folder import StateFolder, check_name
from atoll.site.connection import Connection, address

#: Seconds for which a command tries to reach the server.
PATIENCE = 10.0


class Access(ABC):
    """What an operator may ask and do, with the same answers whichever way."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """How the federation stands."""

    @abstractmethod
    def sites(self) -> list[dict[str, Any]]:
        """Who has joined, was revoked or is invited."""

    @abstractmethod
    def page_of_rounds(self, since: int) -> list[dict[str, Any]]:
        """Some of the attempts at rounds after `since`, oldest first; none if there are no more."""

    @abstractmethod
    def revoke(self, name: str) -> None:
        """Refuse a site from now on."""

    @abstractmethod
    def stop(self) -> None:
        """End the federation."""

    @abstractmethod
    def link(self) -> str:
        """A link that opens the live page once."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what was opened."""

    def rounds(self, since: int = 0) -> Iterator[dict[str, Any]]:
        """All attempts at rounds after `since`, oldest first."""
        while page := self.page_of_rounds(since):
            yield from page
            if page[-1]["state"] != "closed":
                return  # it may have closed since it was read, with others after it
            since = page[-1]["round"]


def access(place: Path, url: str | None = None) -> Access:
    """To the federation of a state folder, or of an identity's folder; `url` is its new address."""
    if (place / "site.json").exists():
        return ByIdentity(place, url)
    if url is not None:
        raise ConfigurationError(f"{place} is no identity's folder, so --url says nothing about it")
    return ByFolder(place)


class ByFolder(Access):
    """On the server's machine, beside the server or without it."""

    def __init__(self, place: Path) -> None:
        self._folder = StateFolder.open(place)
        self._store = self._folder.store()

    def status(self) -> dict[str, Any]:
        return operations.status(self._store, self._folder.project)

    def sites(self) -> list[dict[str, Any]]:
        return operations.sites(self._store)

    def page_of_rounds(self, since: int) -> list[dict[str, Any]]:
        return operations.rounds(self._store, since)

    def revoke(self, name: str) -> None:
        with self._store.change(leading=False) as change:
            operations.revoke(change, _operator(), check_name(name))

    def stop(self) -> None:
        with self._store.change(leading=False) as change:
            operations.stop(change, _operator())

    def link(self) -> str:
        with self._store.change(leading=False) as change:
            ticket = operations.ticket(change, _operator())
        return f"{self._folder.url(self._store.setting('port') or 8443)}/page/#{ticket}"

    def close(self) -> None:
        self._store.close()


class ByIdentity(Access):
    """From anywhere, as an analyst or admin."""

    def __init__(self, place: Path, url: str | None = None) -> None:
        known = read_identity(place)
        if url is not None:
            known["url"] = address(url)
            write_json(place / "site.json", known)
        pem = (place / "ca.pem").read_bytes() if (place / "ca.pem").exists() else None
        key = make_key(place / "key.pem")
        self._url = known["url"]
        self._link = Connection(self._url, pem, key, known["site"], note=note, patience=PATIENCE)

    def status(self) -> dict[str, Any]:
        return dict(self._ask("GET", "/v1/status"))

    def sites(self) -> list[dict[str, Any]]:
        return list(self._ask("GET", "/v1/sites"))

    def page_of_rounds(self, since: int) -> list[dict[str, Any]]:
        return list(self._ask("GET", f"/v1/rounds?since={since}"))

    def revoke(self, name: str) -> None:
        self._ask("POST", f"/v1/sites/{quote(check_name(name))}/revoke")

    def stop(self) -> None:
        self._ask("POST", "/v1/stop")

    def link(self) -> str:
        return f"{self._url}/page/#{self._ask('POST', '/v1/page')['ticket']}"

    def close(self) -> None:
        self._link.close()

    def _ask(self, method: str, target: str) -> Any:
        data = self._link.ask(method, target)
        return json.loads(data) if data else None


def _operator() -> str:
    """Who acts on a state folder, for the audit log."""
    try:
        return f"operator {getpass.getuser()}"
    except (KeyError, OSError):  # a container's user may have no name
        return "operator"


def note(text: str) -> None:
    print(f"atoll: {text}", file=sys.stderr)
