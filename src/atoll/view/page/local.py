"""The page on this machine, beside a run or over finished ones."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

from atoll.errors import ConfigurationError, require
from atoll.view.page.app import Page, asgi
from atoll.view.page.folders import FolderSource


class LocalPage(AbstractContextManager["LocalPage"]):
    """Serves the page on 127.0.0.1, in a thread of its own.

    Args:
        root: the folder of run folders.
        first: the run to show first; None is the newest.
        port: 0 takes a free one.
    """

    def __init__(self, root: Path, first: str | None = None, port: int = 0) -> None:
        require("uvicorn", "atoll[page]", "the live page")
        import uvicorn

        if not 0 <= port < 1 << 16:
            raise ConfigurationError(f"a port is a number from 0 to 65535, not {port}")
        try:
            self._socket = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise ConfigurationError(
                f"port {port} cannot be listened on ({error.strerror}); choose another with --port"
            ) from error
        source = FolderSource(root, first)
        config = uvicorn.Config(
            asgi(Page(lambda: source)), log_config=None, log_level="critical", access_log=False,
            lifespan="off",
            ws="none", timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True, name="page"
        )
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def __enter__(self) -> LocalPage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=5)
        self._socket.close()

    def wait(self) -> None:
        """Until Ctrl-C."""
        while self._thread.is_alive():
            time.sleep(0.2)
