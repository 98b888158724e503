"""Visits: who may look at the live page. No passwords: an identity asks for a ticket, a browser
brings it once and gets a cookie, and both are kept as digests, so that a restart ends no visit."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from atoll.protocol import messages
from atoll.protocol.identity import token_digest
from atoll.service.http.auth import Endpoints
from atoll.service.http.bodies import Refused, short_body
from atoll.service.storage.database import Change, Row, Store
from atoll.service.storage.tables import visits

TICKET_SECONDS, VISIT_SECONDS = 300.0, 12 * 3600.0
OPERATOR = "operator"
TOO_OLD = "this link was used or is too old; run atoll page again"


def issue(change: Change, name: str, key: str) -> str:
    """A ticket for one visit; `key` is the identity's, or empty for the server's own operator."""
    return _add(change, "ticket", name, key, TICKET_SECONDS)


def cookie_of(store: Store) -> str:
    """The cookie's name: only this host, only over TLS, and only this federation, for cookies do
    not tell one port from another."""
    return f"__Host-atoll-{store.identify()[:8]}"


def _add(change: Change, kind: str, name: str, key: str, seconds: float) -> str:
    secret, now = secrets.token_urlsafe(32), time.time()
    change.run(visits.delete().where(visits.c.expires < now))
    change.run(
        visits.insert().values(
            digest=token_digest(secret), kind=kind, name=name, key=key, expires=now + seconds
        )
    )
    return secret


class LoginApi:
    """The endpoints of logging in and out, and the check of everyone who looks."""

    def __init__(self, desk: Endpoints) -> None:
        self.desk = desk

    async def ticket(self, request: Request) -> Response:
        """An analyst's or admin's ticket."""
        session = await self.desk.who(request, "analyst", await short_body(request))
        with self.desk.leading().store.change() as change:
            secret = issue(change, session.site, session.public)
            change.audit(session.site, "asked for the page")
        return JSONResponse({"ticket": secret})

    async def login(self, request: Request) -> Response:
        """A ticket for a cookie."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            # Which another site's form cannot send.
            raise Refused(415, "a ticket comes as JSON")
        ticket = messages.read(messages.Login, await short_body(request)).ticket
        if not _found(self.desk.leading().store, ticket, "ticket"):
            raise Refused(401, TOO_OLD, audited="login")
        with self.desk.leading().store.change() as change:
            mine = visits.c.digest == token_digest(ticket)
            row = change.connection.execute(
                sa.select(visits).where(mine, visits.c.kind == "ticket")
            ).mappings().first()  # fmt: skip
            used = row is not None and change.run(visits.delete().where(mine)) == 1
            if row is None or not used or row["expires"] < time.time():
                raise Refused(401, TOO_OLD, audited="login")
            secret = _add(change, "visit", row["name"], row["key"], VISIT_SECONDS)
            change.audit(row["name"], "opened the page")
        response = Response(status_code=204)
        name = cookie_of(self.desk.leading().store)
        response.set_cookie(
            name, secret, max_age=int(VISIT_SECONDS), path="/", secure=True, httponly=True,
            samesite="strict",
        )  # fmt: skip
        return response

    async def logout(self, request: Request) -> Response:
        """End a visit."""
        store = self.desk.leading().store
        name = cookie_of(store)
        secret = request.cookies.get(name, "")
        # Whoever has nothing to end must not make the database write.
        if _found(store, secret, "visit"):
            with store.change() as change:
                change.run(visits.delete().where(visits.c.digest == token_digest(secret)))
        response = Response(status_code=204)
        response.delete_cookie(name, path="/", secure=True, httponly=True, samesite="strict")
        return response

    async def admit(self, request: Request) -> None:
        """Raise unless the cookie is a visitor's who is still welcome."""
        store = self.desk.leading().store
        if not welcome(store, request.cookies.get(cookie_of(store), "")):
            raise Refused(401, "log in first: run atoll page FOLDER")


def welcome(store: Store, secret: str) -> bool:
    """Whether a cookie's visit goes on: not too old, and of someone who was not revoked since."""
    found = _found(store, secret, "visit")
    if not found:
        return False
    name, key = found[0]["name"], found[0]["key"]
    if not key:
        return True
    row = store.site(name)
    return (
        row is not None
        and row["status"] == "active"
        and row["key"] == key
        and row["role"] in ("analyst", "admin")
    )


def _found(store: Store, secret: str, kind: str) -> Sequence[Row]:
    """What is known of a ticket or cookie that is still good."""
    if not secret:
        return []
    mine = (visits.c.digest == token_digest(secret)) & (visits.c.kind == kind)
    return store.rows(sa.select(visits).where(mine, visits.c.expires >= time.time()))
