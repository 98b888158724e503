"""Serving: one process that leads a federation, or waits to, and answers over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from atoll.core.vectors import Vectors
from atoll.data.federated import FederatedData, check_population
from atoll.errors import AtollError, ConfigurationError, GivenUp, RunError, require
from atoll.protocol.certificates import renew_server, server_context
from atoll.rounds.coordinator import Phase
from atoll.rounds.evaluate import check_evaluation
from atoll.rounds.plan import Plan
from atoll.service.http.app import App
from atoll.service.loop import FederationLoop
from atoll.service.settings import Service
from atoll.service.storage.blobs import blobs_at
from atoll.service.storage.database import NotLeading, Store, said_by
from atoll.service.storage.folder import StateFolder

logger = logging.getLogger("atoll.service")
TICK = 0.25


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server is to be found.

    `linger` is for how many seconds a finished federation goes on answering, so that every site
    learns of the end and fetches the model; it ends sooner when all of them have. Every
    `certificate` seconds it looks whether its certificate is to be renewed.
    """

    host: str = "0.0.0.0"
    port: int = 8443
    blobs: str | None = None
    linger: float = 600.0
    certificate: float = 10.0


def serve(
    plan: Plan,
    folder: StateFolder,
    service: Service,
    listening: Listening,
    test: FederatedData | None = None,
    *,
    initial: Vectors | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Serve until the rounds are done, until `atoll stop`, or until SIGTERM or Ctrl-C.

    `test` is what each new model is measured on: its test part, or all of it if it has none;
    `initial` is the whole model to start from; `stop`, set in another thread, ends it too.
    Returns whether the federation is done, and not only to go on later.
    """
    require("uvicorn", "atoll[serve]", "a federation's server")
    renew_server(folder.path)
    if test is not None:
        test = check_population(test)
        test = test if len(test.test_part) else replace(test, test_part=test.all_train())
        plan.check_data(test)
        check_evaluation(plan, test)
    process = _Process(plan, folder, service, listening, test, initial, stop)
    try:
        with asyncio.Runner(loop_factory=_loop()) as runner:
            runner.run(process.run())
            return process.done
    except sa.exc.DBAPIError as error:
        raise RunError(
            f"the database could not be used: {said_by(error)}. What was decided before is kept; "
            "free some space or bring the database back, then serve again"
        ) from error


def http_config(app: App, host: str, port: int, **more: Any) -> Any:
    """How an application is spoken to: uvicorn's configuration, whoever runs the server."""
    import uvicorn

    from atoll.service.http.heads import BoundedHeads

    return uvicorn.Config(
        app.asgi(), host=host, port=port, log_config=None, access_log=False,
        server_header=False, lifespan="off", timeout_keep_alive=75, http=BoundedHeads,
        proxy_headers=False, ws="none", **more,
    )  # fmt: skip


class _Process:
    def __init__(
        self,
        plan: Plan,
        folder: StateFolder,
        service: Service,
        listening: Listening,
        test: FederatedData | None,
        initial: Vectors | None,
        stop: threading.Event | None,
    ) -> None:
        self.test, self.initial, self.stop = test, initial, stop
        self.plan, self.folder, self.service = plan, folder, service
        self.listening = listening
        self.store = Store(folder.database)
        token = (folder.path / "metrics.token").read_text(encoding="utf-8")
        self.app = App(folder.authority, folder.project, token)
        self.leaving = asyncio.Event()
        self.done = False

    async def run(self) -> None:
        import uvicorn

        config = http_config(
            self.app, self.listening.host, self.listening.port, timeout_graceful_shutdown=3,
            ssl_certfile=self.folder.path / "server.pem",
            ssl_keyfile=str(self.folder.path / "server-key.pem"),
        )  # fmt: skip
        config.load()
        config.ssl = self.context = server_context(self.folder.path)
        server = uvicorn.Server(config)
        # Signals are ours: long polls must be let go before connections are closed.
        server.capture_signals = contextlib.nullcontext  # type: ignore
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.leaving.set)
        listening = asyncio.create_task(server.serve())
        try:
            await self._lead(listening)
        finally:
            self.app.closing.set()
            if self.app.loop is not None:
                self.app.loop.notify()
            server.should_exit = True
            with contextlib.suppress(SystemExit):
                await listening
            self.store.close()

    async def _lead(self, listening: asyncio.Task[None]) -> None:
        """Wait for the lease, then lead until there is a reason to leave."""
        waiting = False
        if self.store.lead():
            # To serve again is to go on after a stop; to take over is not.
            with self.store.change() as change:
                change.set("stop", False)
        while not self.store.lead():
            if waiting and self.store.setting("stop"):
                logger.info("the federation was stopped")
                return
            if not waiting:
                logger.info("another process leads this federation; standing by")
                waiting = True
            if await self._paused(1.0, listening):
                return
        loop = FederationLoop(
            self.plan, self.service, self.store,
            blobs_at(self.listening.blobs or str(self.folder.path / "blobs")),
            self.folder.path / "incoming", test=self.test, history=self.folder.path / "run",
            initial=self.initial,
        )  # fmt: skip
        with self.store.change() as change:
            change.set("blobs", self.listening.blobs)
            change.set("port", self.listening.port)
            change.set("project", self.folder.project)
        tasks = [
            asyncio.create_task(self._keep_lease(loop)),
            asyncio.create_task(self._keep_certificate()),
        ]
        try:
            await loop.start()
            await self._led(loop, listening)
        finally:
            for task in tasks:
                task.cancel()

    async def _keep_certificate(self) -> None:
        """Renew the certificate before it ends, and take up one that was made beside."""
        path = self.folder.path / "server.pem"
        known = path.stat().st_mtime_ns
        while True:
            await asyncio.sleep(self.listening.certificate)
            try:
                renew_server(self.folder.path)
                now = path.stat().st_mtime_ns
                if now != known:
                    self.context.load_cert_chain(path, self.folder.path / "server-key.pem")
                    known = now
                    logger.info("the server's certificate is another now")
            except (AtollError, OSError) as error:
                logger.error("the server's certificate: %s", error)

    async def _keep_lease(self, loop: FederationLoop) -> None:
        """Renew the lease all the while, also when a start or a step takes long."""
        while True:
            await asyncio.sleep(self.store.lease_seconds / 4)
            try:
                if not self.store.lead():
                    raise NotLeading("another process took over the federation")
            except Exception as error:
                loop.failed = error
                return

    async def _led(self, loop: FederationLoop, listening: asyncio.Task[None]) -> None:
        self.app.loop = loop
        logger.info(
            "leading %s at round %d of %d", self.folder.project,
            min(loop.coordinator.round, self.plan.schedule.rounds), self.plan.schedule.rounds,
        )  # fmt: skip
        try:
            await self._run_rounds(loop, listening)
        finally:
            self.done = loop.done and loop.outcome == "done"
            try:
                await loop.close()
                self.store.resign()
            except AtollError as error:
                logger.error("the server could not put everything in order: %s", error)

    async def _run_rounds(self, loop: FederationLoop, listening: asyncio.Task[None]) -> None:
        ends: float | None = None
        while True:
            now = asyncio.get_running_loop().time()
            if loop.failed is None:
                loop.tick()
            if loop.failed is not None:
                raise RunError(f"the server stopped: {loop.failed}") from loop.failed
            if loop.done:
                ends = now + self.listening.linger if ends is None else ends
                if now >= ends or not set(loop.members.names) - loop.members.told:
                    break
            if await self._paused(TICK, listening):
                break
        if loop.diverged:
            raise GivenUp(
                "the federation was given up: nothing but refused updates came; the log says why"
            )
        if loop.coordinator.phase is Phase.FAILED:
            raise GivenUp(
                "the federation was given up: a round was abandoned too often; `atoll rounds` "
                "says why. To try again: atoll serve ... --set schedule.attempts=MORE"
            )

    async def _paused(self, seconds: float, listening: asyncio.Task[None]) -> bool:
        """Wait a moment; True if it is time to leave."""
        if listening.done():
            raise ConfigurationError(
                f"port {self.listening.port} cannot be listened on; is another server running? "
                "choose another with --port"
            )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.leaving.wait(), seconds)
        return self.leaving.is_set() or (self.stop is not None and self.stop.is_set())


def _loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it can be had, which halves the cost of a request."""
    try:
        import uvloop
    except ImportError:
        return None
    found: Any = uvloop.new_event_loop
    return found  # type: ignore[no-any-return]
