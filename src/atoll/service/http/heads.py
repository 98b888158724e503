"""Heads: an HTTP connection whose request lines and headers are bounded in size and time.

uvicorn's parser reads a head of any length, for as long as it takes, before anyone is asked who
they are.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT = 1 << 15
HEAD_PATIENCE = 30.0


class BoundedHeads(HttpToolsProtocol):
    """A connection that is closed when a head is too long, or too long in coming."""

    _taken = _headers_taken = 0
    _in_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._taken += len(data)
        super().data_received(data)
        if self._in_head and self._taken > HEAD_LIMIT:
            self._close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers_taken = 0
        self._wait()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._headers_taken += len(name) + len(value)
        if self._headers_taken > HEAD_LIMIT:
            self._close()

    def on_headers_complete(self) -> None:
        self._in_head, self._taken = False, 0
        self._unwait()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        if not self.transport.is_closing():
            super().on_message_complete()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_PATIENCE, self._close)

    def _unwait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._timer = None
        self.transport.close()
