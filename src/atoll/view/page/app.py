"""The page's HTTP side: static files, JSON, and a stream of events that can be picked up again.

An event's id is the number of its round, as the store has it, behind the store's epoch. A browser
that was cut off says the last one it saw, and gets what came since: after a lost connection and
after a restart alike. Where the epoch is another, it begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import Counter
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
from atoll.view.page.source import Source, Unknown

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
#: Seconds between looks for news, until a silent stream says that it is there, and between looks
#: whether whoever watches may still do so.
LOOK, PULSE, RECHECK = 0.5, 15.0, 3.0
#: Streams at the same time, of everyone and of one visitor.
STREAMS, EACH = 200, 10


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
        self._streams: Counter[str] = Counter()

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
            route("api/runs/{run}/rounds/{round}", self.participants),
            route("api/runs/{run}/events", self.events),
        ]

    async def file(self, request: Request) -> Response:
        name = request.path_params.get("file", "index.html")
        if name not in FILES:
            raise HTTPException(404, "there is no such file")
        content = files("atoll.view.page").joinpath("static", name).read_bytes()
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
        found = await _known(source.clients(run))
        # It may be long, and others wait for this loop.
        text = await asyncio.to_thread(_text, found)
        return Response(text, media_type="application/json", headers=HEADERS)

    async def participants(self, request: Request) -> Response:
        source, run = await self._seen(request), request.path_params["run"]
        number = _number(request.path_params["round"])
        if number is None:
            raise HTTPException(404, "a round is a number")
        return _json(await _known(source.participants(run, number)))

    async def events(self, request: Request) -> Response:
        """Rounds as they close, from the one after `Last-Event-ID` (or `after`)."""
        source, run = await self._seen(request), request.path_params["run"]
        given = request.headers.get("last-event-id") or request.query_params.get("after", "")
        epoch, _, round = given[:60].rpartition(".")
        visitor = request.headers.get("cookie", "")
        if sum(self._streams.values()) >= STREAMS or self._streams[visitor] >= EACH:
            raise HTTPException(503, "too many pages are watching; close some, or try again later")
        self._streams[visitor] += 1
        try:
            await _known(source.since(run, 0))
        except BaseException:
            self._streams[visitor] -= 1
            raise
        return StreamingResponse(
            self._stream(request, source, run, (epoch, _number(round) or 0), visitor),
            media_type="text/event-stream",
            # Proxies that would wait for the end must not.
            headers={**HEADERS, "x-accel-buffering": "no"},
        )

    async def _stream(
        self, request: Request, source: Source, run: str, known: tuple[str, int], visitor: str
    ) -> AsyncIterator[str]:
        epoch, last = known
        told, spoken = None, time.monotonic()
        checked = spoken
        try:
            yield "retry: 1000\n\n"
            while True:
                # Looked at first: whoever watches learns of the end before the server leaves.
                last_look = self._closing.is_set()
                if time.monotonic() - checked >= RECHECK:
                    await self._seen(request)
                    checked = time.monotonic()
                rows, state = await source.since(run, last)
                if state["epoch"] != epoch:
                    epoch, last = state["epoch"], 0
                    yield f"event: reset\ndata: {_text(epoch)}\n\n"
                    rows, state = await source.since(run, 0)
                for row in rows:
                    last = row["round"]
                    yield f"id: {epoch}.{last}\nevent: round\ndata: {_text(row)}\n\n"
                if state != told:
                    told = state
                    yield f"event: state\ndata: {_text(state)}\n\n"
                    spoken = time.monotonic()
                elif time.monotonic() - spoken >= PULSE:
                    yield ": still here\n\n"
                    spoken = time.monotonic()
                if last_look:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), LOOK)
        except (Unknown, HTTPException, AtollError):
            return
        finally:
            self._streams[visitor] -= 1
            if not self._streams[visitor]:
                del self._streams[visitor]

    async def _seen(self, request: Request) -> Source:
        """The source, for whoever may see it."""
        if request.headers.get("sec-fetch-site", "") == "cross-site":
            raise HTTPException(403, "the page answers its own scripts only")
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
    except AtollError as error:
        raise HTTPException(409, str(error)) from error


def _number(text: str) -> int | None:
    """A whole number from outside, of a length that is one."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else None


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
