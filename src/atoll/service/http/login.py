"""Login: who may look at the live page. No passwords: an identity asks for a ticket, a browser
brings it once and gets a cookie."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from atoll.protocol import messages
from atoll.service import operations
from atoll.service.http.auth import Endpoints
from atoll.service.http.bodies import Refused, short_body
from atoll.service.storage import visits
from atoll.service.storage.database import Store

TOO_OLD = "this link was used or is too old; run atoll page again"


def cookie_of(store: Store) -> str:
    """The cookie's name: only this host, only over TLS, and only this federation, for cookies do
    not tell one port from another."""
    return f"__Host-atoll-{store.identify()[:8]}"


class LoginApi:
    """The endpoints of logging in and out, and the check of everyone who looks."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints

    async def ticket(self, request: Request) -> Response:
        """An analyst's or admin's ticket."""
        session = await self.endpoints.who(request, "analyst", await short_body(request))
        with self.endpoints.leading().store.change() as change:
            secret = operations.ticket(change, session.site, session.public)
        return JSONResponse({"ticket": secret})

    async def login(self, request: Request) -> Response:
        """A ticket for a cookie."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            # Which another site's form cannot send.
            raise Refused(415, "a ticket comes as JSON")
        ticket = messages.read(messages.Login, await short_body(request)).ticket
        store = self.endpoints.leading().store
        # Whoever has nothing to bring must not make the database write.
        if visits.find(store, "ticket", ticket) is None:
            raise Refused(401, TOO_OLD, audited="login")
        with store.change() as change:
            found = visits.exchange(change, ticket)
            if found is None:
                raise Refused(401, TOO_OLD, audited="login")
            name, secret = found
            change.audit(name, "opened the page")
        response = Response(status_code=204)
        response.set_cookie(
            cookie_of(store), secret, max_age=int(visits.VISIT_SECONDS), path="/", secure=True,
            httponly=True, samesite="strict",
        )  # fmt: skip
        return response

    async def logout(self, request: Request) -> Response:
        """End a visit."""
        store = self.endpoints.leading().store
        name = cookie_of(store)
        secret = request.cookies.get(name, "")
        # Whoever has nothing to end must not make the database write.
        if visits.find(store, "visit", secret) is not None:
            with store.change() as change:
                visits.end(change, secret)
        response = Response(status_code=204)
        response.delete_cookie(name, path="/", secure=True, httponly=True, samesite="strict")
        return response

    async def admit(self, request: Request) -> None:
        """Raise unless the cookie is a visitor's who is still welcome."""
        store = self.endpoints.leading().store
        if not visits.welcome(store, request.cookies.get(cookie_of(store), "")):
            raise Refused(401, "log in first: run atoll page FOLDER")
