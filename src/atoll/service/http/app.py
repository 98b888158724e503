"""The application: HTTP in, decisions of the federation loop out.

Who asks is settled before a body is read, and a body is never held whole: JSON is short, tensors go
to a file as they come. Every refusal has a status, a sentence and a count.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from atoll.protocol import messages
from atoll.service.http.admin_api import AdminApi
from atoll.service.http.auth import Endpoints
from atoll.service.http.enrolment import EnrolmentApi
from atoll.service.http.login import LoginApi
from atoll.service.http.openapi import OFFSET, SINCE, WAIT, Described
from atoll.service.http.site_api import SiteApi
from atoll.service.http.watching import ServedSource
from atoll.view.page.app import Page

Endpoint = Callable[[Request], Awaitable[Response]]
#: What an update that is not taken brings: what became of it, or why nothing did.
REFUSED = (messages.Verdict, messages.Problem)


class App(Endpoints):
    """The HTTP side of one server process."""

    def asgi(self) -> Starlette:
        """The ASGI application."""
        joining, working, looking = EnrolmentApi(self), SiteApi(self), AdminApi(self)
        visiting, watching = LoginApi(self), ServedSource(self)
        page = Page(lambda: watching, visiting.admit, self.closing)

        def route(method: str, path: str, endpoint: Endpoint, *about: Any, **more: Any) -> Route:
            counted = self.counted(endpoint, path)
            return Described(method, path, counted, *about, **more)

        def hidden(path: str, endpoint: Endpoint, method: str) -> Route:
            return Route(path, self.counted(endpoint, path), methods=[method])

        sites: list[BaseRoute] = [
            route("GET", "/health", looking.health, "Whether this process leads",
                  {200: None, 503: None}, sealed=False),
            route("GET", "/metrics", looking.metrics, "Prometheus text", {200: None}, 401,
                  sealed=False),
            route("GET", "/v1/openapi.json", looking.openapi, "This description", {200: None},
                  sealed=False),
            route("GET", "/v1/ca", joining.ca, "The project's certificate (PEM)", {200: None},
                  sealed=False),
            route("POST", "/v1/enrol", joining.enrol, "Join with a one-time token",
                  {200: messages.Enrolled}, 401, 403, body=messages.Enrol, sealed=False),
            route("POST", "/v1/challenge", joining.challenge, "Ask for a number to sign",
                  {200: messages.Challenge}, body=messages.Challenge, sealed=False),
            route("POST", "/v1/session", joining.session, "Open a session",
                  {200: messages.SessionOpened}, 401, 403, body=messages.OpenSession,
                  sealed=False),
            route("POST", "/v1/checkin", working.checkin, "Ask what to do", {200: messages.Order},
                  body=messages.CheckIn, parameters=[WAIT]),
            route("GET", "/v1/blobs/{digest}", working.blob,
                  "A model by its SHA-256, whole or one range of bytes",
                  {200: None, 206: None, 304: None}, 404, 416),
            route("POST", "/v1/uploads", working.offer, "Offer an update",
                  {200: messages.Verdict, 201: None, 410: REFUSED}, body=messages.Offer),
            route("HEAD", "/v1/uploads/{upload}", working.offset, "How much has come",
                  {200: None}, 410),
            route("PATCH", "/v1/uploads/{upload}", working.append,
                  "Append bytes; the last ones bring the verdict",
                  {200: messages.Verdict, 204: None, 404: messages.Verdict, 410: REFUSED,
                   422: REFUSED}, 423, body=bytes, parameters=[OFFSET]),
            route("POST", "/v1/assignments/{assignment}/fail", working.fail,
                  "Say that an update will not come", {204: None}, 404, 410,
                  body=messages.Failure),
            route("POST", "/v1/measured", working.measured,
                  "Say how good a model is on rows that the site holds out", {204: None}, 410,
                  body=messages.Measured),
        ]  # fmt: skip
        operators: list[BaseRoute] = [
            route("GET", "/v1/status", looking.status, "How the federation stands (analyst)",
                  {200: None}),
            route("GET", "/v1/rounds", looking.rounds, "Rounds, oldest first (analyst)",
                  {200: None}, 400, parameters=[SINCE]),
            route("GET", "/v1/sites", looking.sites, "Who has joined or is invited (analyst)",
                  {200: None}),
            route("POST", "/v1/sites/{site}/revoke", looking.revoke,
                  "Revoke a site, or its invitation (admin)", {204: None}, 404),
            route("POST", "/v1/stop", looking.stop, "Stop (admin)", {204: None}),
            route("POST", "/v1/page", visiting.ticket, "A ticket for the live page (analyst)",
                  {200: None}),
        ]  # fmt: skip
        app = Starlette(
            routes=[
                *sites,
                *operators,
                hidden("/page/login", visiting.login, "POST"),
                hidden("/page/logout", visiting.logout, "POST"),
                Route("/page", lambda _: RedirectResponse("/page/")),
                *page.routes("/page/", self.counted),
            ],
            exception_handlers={HTTPException: _problem, Exception: _broken},
        )
        app.router.redirect_slashes = False
        return app


def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = messages.write(messages.Problem(str(error.detail)[:1000]))
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _broken(request: Request, error: Exception) -> Response:
    body = messages.write(messages.Problem("the server failed; its log says how"))
    return Response(body, 500, media_type="application/json")
