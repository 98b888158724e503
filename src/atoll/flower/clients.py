"""Clients: who answers a message, in this process or in others of this machine.

Each answer draws from a key of its own, so that where and when it is given changes nothing.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from atoll.core.random import Key
from atoll.errors import ConfigurationError
from atoll.flower.apps import App, Settings, loaded
from atoll.flower.draws import at_import, import_torch_for, seeded

logger = logging.getLogger("atoll.flower")
#: Flower's code of an error that a ClientApp raised.
RAISED = 2
#: What stands for a client's number in what its node is told.
NUMBER = "{partition-id}"


class Clients(ABC):
    """The clients of an app, by their numbers; safe to call from several threads."""

    #: How many may answer at the same time.
    width = 1

    def __init__(self, app: App) -> None:
        #: What clients keep from one message to the next.
        self.contexts = {client: _context(client, app) for client in range(app.clients)}

    @abstractmethod
    def answer(self, client: int, message: Message, key: Key) -> tuple[Message, float]:
        """What a client says to a message, drawing from `key`; and its own seconds for it."""

    def close(self) -> None:
        """Let workers go."""


class Here(Clients):
    """One client after the other, in this process."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self._app = app.client
        # The streams of draws are the process's own.
        self._lock = threading.Lock()

    def answer(self, client: int, message: Message, key: Key) -> tuple[Message, float]:
        with self._lock:
            begun = time.monotonic()
            reply, self.contexts[client] = answered(self._app, message, self.contexts[client], key)
            return reply, time.monotonic() - begun


class Workers(Clients):
    """Several clients at once, each in one of some processes that have imported the app."""

    def __init__(self, app: App, count: int) -> None:
        super().__init__(app)
        self.width = count
        if not app.place:
            raise ConfigurationError(
                f"{app.name} is a script, whose client cannot be imported elsewhere; run it with "
                "one worker"
            )
        self._begun = app.place, app.references[1], at_import(app.seed)
        self._lock = threading.Lock()
        self._pool = self._fresh()

    def _fresh(self) -> ProcessPoolExecutor:
        # Not by a fork: the libraries of most apps do not survive one.
        spawned = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.width, spawned, _begin, self._begun)

    def answer(self, client: int, message: Message, key: Key) -> tuple[Message, float]:
        pool = self._pool
        try:
            task = pool.submit(_answered, message, self.contexts[client], key)
            reply, context, seconds = task.result()
        except BrokenProcessPool:
            with self._lock:
                if pool is self._pool:
                    self._pool = self._fresh()
            return Message(Error(RAISED, "the client's process died"), reply_to=message), 0.0
        self.contexts[client] = context
        return reply, seconds

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def answered(
    app: ClientApp, message: Message, context: Context, key: Key
) -> tuple[Message, Context]:
    """The reply of an app, and what its client keeps.

    Whatever it raises is an error in words, as Flower has it, and then the client keeps nothing.
    """
    own = copy.deepcopy(context)
    with seeded(key):
        try:
            reply: Any = app(message, own)
        except (Exception, SystemExit) as error:
            logger.debug("a client of the app failed", exc_info=error)
            text = f"{type(error).__name__}: {error}{_place_of(error)}"
            return Message(Error(RAISED, text), reply_to=message), context
    if not isinstance(reply, Message):
        text = f"the ClientApp gave {type(reply).__name__}, not a Message"
        return Message(Error(RAISED, text), reply_to=message), context
    return reply, own


def _place_of(error: BaseException) -> str:
    """Where in the app an error came from, as people look for it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    own = [frame for frame in own if frame.filename != __file__]
    if not own:
        return ""
    return f" (in {own[-1].name}, {Path(own[-1].filename).name} line {own[-1].lineno})"


def _context(client: int, app: App) -> Context:
    place: Settings = {"partition-id": client, "num-partitions": app.clients}
    for name, value in app.node_config.items():
        place[name] = value.replace(NUMBER, str(client)) if isinstance(value, str) else value
    return Context(1, client + 1, place, RecordDict(), dict(app.config))


_app: ClientApp | None = None


def _begin(place: str, reference: str, key: Key) -> None:
    global _app  # noqa: PLW0603
    from flwr.supercore.task_identity import TaskIdentity

    import_torch_for(Path(place))
    sys.path.insert(0, place)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    with seeded(key):
        _app = loaded(reference)


def _answered(message: Message, context: Context, key: Key) -> tuple[Message, Context, float]:
    assert _app is not None
    begun = time.monotonic()
    reply, kept = answered(_app, message, context, key)
    return reply, kept, time.monotonic() - begun
