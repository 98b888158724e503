"""Deciding: a transaction whose failure ends the process; memory must not be ahead of the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atoll.errors import RunError
from atoll.service.storage.database import Change

if TYPE_CHECKING:
    from atoll.service.loop import FederationLoop


class Deciding:
    """One decision of the federation loop, which is `failed` if it cannot be kept."""

    def __init__(self, loop: FederationLoop) -> None:
        self._loop = loop
        self._change = loop.store.change()

    def __enter__(self) -> Change:
        if self._loop.failed is not None:
            raise RunError(f"this process is ending: {self._loop.failed}")
        try:
            return self._change.__enter__()
        except BaseException as error:
            self._loop.failed = error
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._change.__exit__(*error)
        except BaseException as reason:
            self._loop.failed = reason
            raise
        if error[1] is not None:
            self._loop.failed = error[1]
