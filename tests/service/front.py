"""A proxy before a server, as nginx is one: TLS at both ends, under a path, with its own mind."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import urllib3

from atoll.protocol.certificates import client_context


class Front:
    """Passes what lies under `prefix` on, without it.

    `says` may answer with a status itself, of (method, target, bytes of the body); None passes on.
    """

    def __init__(
        self,
        port: int,
        state,
        prefix: str = "",
        says: Callable[[str, str, int], int | None] = lambda method, target, size: None,
    ) -> None:
        self.prefix, self.says, self.seen = prefix, says, []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                target = self.path
                status = front.says(self.command, target, len(body))
                if status is None and not target.startswith(front.prefix + "/"):
                    status = 404
                front.seen.append((self.command, target, status))
                if status is not None:
                    return self.answered(status, {}, b"<html>nginx</html>")
                try:
                    found = pool.request(
                        self.command, f"https://127.0.0.1:{port}{target[len(front.prefix):]}",
                        body=body, headers={n: v for n, v in self.headers.items() if n != "Host"},
                        timeout=60, retries=False, preload_content=True, decode_content=False,
                    )  # fmt: skip
                except urllib3.exceptions.HTTPError:
                    return self.answered(502, {}, b"<html>bad gateway</html>")
                return self.answered(found.status, found.headers, found.data)

            def answered(self, status, headers, data):
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_HEAD = handle_one  # noqa: N815

            def log_message(self, *about):
                pass

        context = client_context((state / "ca.pem").read_bytes())
        pool = urllib3.PoolManager(ssl_context=context, maxsize=8)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(state / "server.pem", state / "server-key.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._server.server_port}{self.prefix}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
