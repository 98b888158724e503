"""The page's HTTP side: static files, JSON, and a stream of events that can be picked up again.

An event's id is the number of its round, as the store has it. A browser that was cut off says the
last one it saw, and gets what came since: after a lost connection and after a restart alike.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from atoll.errors import AtollError
from atoll.page.source import Source, Unknown

Endpoint = Callable[[Request], Awaitable[Response]]
FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "uplot.css": "text/css; charset=utf-8",
    "uplot.js": "text/javascript; charset=utf-8",
}
#: The page runs its own scripts and talks to its own server, and nothing else.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' "
    "'unsafe-inline'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
#: Seconds between looks for news, and until a silent stream says that it is there.
LOOK, PULSE = 0.5, 15.0
#: Streams at the same time.
STREAMS = 200


class Page:
    """The endpoints over one source.

    Args:
        source: what is shown; None while there is nothing to show, as on a standby server.
        admit: raises for whoever may not see it; None admits everyone.
        closing: set when streams must end.
    """

    def __init__(
        self,
        source: Callable[[], Source | None],
        admit: Callable[[Request], Awaitable[object]] | None = None,
        closing: asyncio.Event | None = None,
    ) -> None:
        self._source, self._admit = source, admit
        self._closing = closing or asyncio.Event()
        self._streams = 0

    def routes(
        self, base: str, wrap: Callable[[Endpoint, str], Endpoint] | None = None
    ) -> list[Route]:
        """All routes below `base`, which ends in a slash."""

        def route(path: str, endpoint: Endpoint) -> Route:
            return Route(base + path, endpoint if wrap is None else wrap(endpoint, base + path))

        return [
            route("", self.file),
            route("{file}", self.file),
            route("api/runs", self.runs),
            route("api/runs/{run}", self.about),
            route("api/runs/{run}/rows", self.rows),
            route("api/runs/{run}/clients", self.clients),
            route("api/runs/{run}/rounds/{round:int}", self.participants),
            route("api/runs/{run}/events", self.events),
        ]

    async def file(self, request: Request) -> Response:
        name = request.path_params.get("file", "index.html")
        if name not in FILES:
            raise HTTPException(404, "there is no such file")
        content = files("atoll.page").joinpath("static", name).read_bytes()
        return Response(content, media_type=FILES[name], headers=HEADERS)

    async def runs(self, request: Request) -> Response:
        return _json(await (await self._seen(request)).runs())

    async def about(self, request: Request) -> Response:
        source, run = await self._seen(request), request.path_params["run"]
        return _json(await _known(source.about(run)))

    async def rows(self, request: Request) -> Response:
        source, run = await self._seen(request), request.path_params["run"]
        rows, state = await _known(source.since(run, 0))
        return _json({"rows": rows, "state": state})

    async def clients(self, request: Request) -> Response:
        source, run = await self._seen(request), request.path_params["run"]
        return _json(await _known(source.clients(run)))

    async def participants(self, request: Request) -> Response:
        source, run = await self._seen(request), request.path_params["run"]
        return _json(await _known(source.participants(run, request.path_params["round"])))

    async def events(self, request: Request) -> Response:
        """Rounds as they close, from the one after `Last-Event-ID` (or `after`)."""
        source, run = await self._seen(request), request.path_params["run"]
        given = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        last = int(given) if given.isdecimal() and len(given) < 12 else 0
        await _known(source.since(run, last))
        if self._streams >= STREAMS:
            raise HTTPException(503, "too many people are watching; try again later")
        return StreamingResponse(
            self._stream(request, source, run, last),
            media_type="text/event-stream",
            # Proxies that would wait for the end must not.
            headers={**HEADERS, "x-accel-buffering": "no"},
        )

    async def _stream(
        self, request: Request, source: Source, run: str, last: int
    ) -> AsyncIterator[str]:
        self._streams += 1
        told, quiet = None, 0.0
        try:
            yield "retry: 1000\n\n"
            while True:
                # Looked at first: whoever watches learns of the end before the server leaves.
                last_look = self._closing.is_set()
                rows, state = await source.since(run, last)
                for row in rows:
                    last = row["round"]
                    yield f"id: {last}\nevent: round\ndata: {_text(row)}\n\n"
                if state != told:
                    told = state
                    yield f"event: state\ndata: {_text(state)}\n\n"
                    quiet = 0.0
                elif quiet >= PULSE:
                    # Whoever was shut out meanwhile is told with the next request.
                    await self._seen(request)
                    yield ": still here\n\n"
                    quiet = 0.0
                if last_look:
                    return
                try:
                    await asyncio.wait_for(self._closing.wait(), LOOK)
                except TimeoutError:
                    quiet += LOOK
        except (Unknown, HTTPException, AtollError):
            return
        finally:
            self._streams -= 1

    async def _seen(self, request: Request) -> Source:
        """The source, for whoever may see it."""
        if self._admit is not None:
            await self._admit(request)
        source = self._source()
        if source is None:
            raise HTTPException(503, "this server does not lead the federation now")
        return source


def asgi(page: Page) -> Starlette:
    """The page by itself, for a browser on this machine."""
    # A page of somebody else's must not reach it under a name of its own.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    return Starlette(
        routes=page.routes("/"), middleware=[hosts], exception_handlers={HTTPException: _problem}
    )


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code)


async def _known(found: Awaitable[Any]) -> Any:
    try:
        return await found
    except Unknown as error:
        raise HTTPException(404, str(error)) from error


def _json(value: Any) -> Response:
    return Response(_text(value), media_type="application/json", headers=HEADERS)


def _text(value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_plain(value), separators=(",", ":"))


def _plain(value: Any) -> Any:
    """A value in which what is not a finite number is null."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
