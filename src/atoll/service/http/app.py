"""The application: HTTP in, decisions of the conductor out.

Who asks is settled before a body is read, and a body is never held whole: JSON is short, tensors go
to a file as they come. Every refusal has a status, a sentence and a count.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from atoll.protocol import messages
from atoll.service.http.admin_api import AdminApi
from atoll.service.http.auth import Endpoints
from atoll.service.http.enrolment import EnrolmentApi
from atoll.service.http.login import LoginApi
from atoll.service.http.site_api import SiteApi
from atoll.service.http.watching import ServedSource
from atoll.view.page.app import Page


class App(Endpoints):
    """The HTTP side of one server process."""

    def asgi(self) -> Starlette:
        """The ASGI application."""
        joining, working, looking = EnrolmentApi(self), SiteApi(self), AdminApi(self)
        visiting, watching = LoginApi(self), ServedSource(self)
        page = Page(lambda: watching, visiting.admit, self.closing)

        def route(path: str, endpoint: Callable[..., Awaitable[Response]], method: str) -> Route:
            return Route(path, self.counted(endpoint, path), methods=[method])

        app = Starlette(
            routes=[
                route("/health", looking.health, "GET"),
                route("/metrics", looking.metrics, "GET"),
                route("/v1/openapi.json", looking.openapi, "GET"),
                route("/v1/ca", joining.ca, "GET"),
                route("/v1/enrol", joining.enrol, "POST"),
                route("/v1/challenge", joining.challenge, "POST"),
                route("/v1/session", joining.session, "POST"),
                route("/v1/checkin", working.checkin, "POST"),
                route("/v1/blobs/{digest}", working.blob, "GET"),
                route("/v1/uploads", working.offer, "POST"),
                route("/v1/uploads/{upload}", working.offset, "HEAD"),
                route("/v1/uploads/{upload}", working.append, "PATCH"),
                route("/v1/assignments/{assignment}/fail", working.fail, "POST"),
                route("/v1/status", looking.status, "GET"),
                route("/v1/rounds", looking.rounds, "GET"),
                route("/v1/sites", looking.sites, "GET"),
                route("/v1/sites/{site}/revoke", looking.revoke, "POST"),
                route("/v1/stop", looking.stop, "POST"),
                route("/v1/page", visiting.ticket, "POST"),
                route("/page/login", visiting.login, "POST"),
                route("/page/logout", visiting.logout, "POST"),
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
