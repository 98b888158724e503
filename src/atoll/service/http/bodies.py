"""Bodies: read within bounds of size and time, and handed out whole or by range."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from atoll.protocol import messages
from atoll.service.loop import FederationLoop
from atoll.service.storage.tables import versions

#: Seconds between two pieces of a body, after which the sender is given up.
BODY_PATIENCE = 30.0
BLOCK = 1 << 20


class Refused(HTTPException):
    """A request that is refused, and why; `audited` ones are somebody's doing, not bad luck."""

    def __init__(
        self, status: int, reason: str, *, audited: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, reason, headers)
        self.audited = audited


async def short_body(request: Request) -> bytes:
    """A short body, read in pieces so that a long one is noticed."""
    taken = bytearray()
    try:
        async with asyncio.timeout(BODY_PATIENCE):
            async for piece in streamed(request):
                taken += piece
                if len(taken) > messages.BODY_LIMIT:
                    raise Refused(413, f"a message has at most {messages.BODY_LIMIT} bytes")
    except TimeoutError:
        raise Refused(408, f"the message took longer than {BODY_PATIENCE:.0f} seconds") from None
    return bytes(taken)


async def streamed(request: Request) -> AsyncIterator[bytes]:
    """The pieces of a body, none of which may be long in coming."""
    pieces = request.stream()
    while True:
        try:
            async with asyncio.timeout(BODY_PATIENCE):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise Refused(408, f"nothing came for {BODY_PATIENCE:.0f} seconds") from None
        if piece is None:
            return
        if piece:
            yield piece


async def gathered(request: Request, most: int) -> AsyncIterator[bytes]:
    """A long body in blocks of about 1 MiB; what came before a break is handed out too."""
    held: list[bytes] = []
    came = length = 0
    try:
        async for piece in streamed(request):
            came += len(piece)
            if came > most:
                raise Refused(413, f"more came than the {most} bytes to come", audited="upload")
            held.append(piece)
            length += len(piece)
            if length >= BLOCK:
                yield b"".join(held)
                held, length = [], 0
    except (ClientDisconnect, Refused) as error:
        if held and getattr(error, "status_code", 408) == 408:
            yield b"".join(held)
        raise
    if held:
        yield b"".join(held)


async def pieces(
    loop: FederationLoop, site: str, digest: str, start: int, stop: int
) -> AsyncIterator[bytes]:
    """A blob's bytes from `start` to `stop`; a site that receives them is there."""
    async with contextlib.aclosing(
        read_in_threads(loop.models.blobs.read(digest, start, stop))
    ) as read:
        async for piece in read:
            if site in loop.members.seen:
                loop.members.saw(site)
            yield piece


async def read_in_threads(source: Generator[bytes]) -> AsyncGenerator[bytes]:
    """What a generator gives, each piece made in a thread; it is closed in the end.

    Whoever receives it may go away while a thread is at work, which is then let finish: a generator
    that runs cannot be closed.
    """
    step: asyncio.Future[bytes] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, source, b""))
            piece = await asyncio.shield(step)
            if not piece:
                return
            yield piece
    finally:
        if step is None or step.done():
            source.close()
        else:
            step.add_done_callback(partial(_close, source))


def _close(source: Generator[bytes], step: asyncio.Future[bytes]) -> None:
    if not step.cancelled():
        step.exception()  # seen; nobody is there any more to hear of it
    source.close()


def versions_named(digest: str) -> sa.Select[Any]:
    """The versions whose broadcast or model is this blob: nothing else is handed out."""
    return sa.select(versions.c.version).where(
        (versions.c.broadcast == digest) | (versions.c.model == digest)
    )


def byte_range(text: str | None, size: int) -> tuple[int, int, int]:
    """Start, stop and status of a range request: one range, from somewhere to somewhere."""
    if text is None:
        return 0, size, 200
    unit, _, rest = text.partition("=")
    first, dash, last = rest.partition("-")
    simple = unit == "bytes" and dash and first.isdecimal() and (not last or last.isdecimal())
    if not simple or len(first) > 18 or len(last) > 18:
        return 0, size, 200
    start, stop = int(first), min(int(last) + 1 if last else size, size)
    if start >= stop:
        raise Refused(
            416, f"the blob has {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, stop, 206


def length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise Refused(400, "wait is a number of seconds")
    return value


def soon() -> dict[str, str]:
    """The header that asks to try again in a moment."""
    return {"Retry-After": str(random.randint(1, 3))}


def answered(message: messages.Message, status: int = 200) -> Response:
    """A message as an answer."""
    return Response(messages.write(message), status, media_type="application/json")
