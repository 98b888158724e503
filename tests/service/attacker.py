"""What an attack needs: sealed requests by hand, raw sockets, and a server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import requests
import sqlalchemy as sa
import urllib3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.core import safetensors
from atoll.core.updates import Update
from atoll.core.vectors import Vectors
from atoll.protocol.certificates import client_context
from atoll.protocol.identity import ENROL, OPEN, Token, public_key, seal
from atoll.rounds.describe import plan_digest
from atoll.rounds.messages import pack
from atoll.rounds.plan import Plan
from atoll.service.http.app import App
from atoll.service.loop import FederationLoop
from atoll.service.serve import http_config
from atoll.service.settings import Service
from atoll.service.storage.blobs import blobs_at
from atoll.service.storage.database import Store
from atoll.service.storage.folder import StateFolder
from atoll.service.storage.tables import metadata


@dataclass
class Target:
    """A server under attack, by its address and its state folder."""

    url: str
    state: Path
    plan: Plan

    def __post_init__(self) -> None:
        self.pool = self.new_pool()
        self._refills = 0.0

    def new_pool(self) -> urllib3.PoolManager:
        if self.url.startswith("http:"):
            return urllib3.PoolManager(maxsize=4)
        authority = (self.state / "ca.pem").read_bytes()
        return urllib3.PoolManager(ssl_context=client_context(authority), maxsize=4)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, method: str, target: str, body: Any = None, headers=None, **more: Any) -> Any:
        """One request, as it is, without a second try."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        return self.pool.request(
            method, self.url + target, body=body, headers=headers or {},
            retries=False, redirect=False, timeout=20, **more,
        )  # fmt: skip

    def connect(self) -> socket.socket:
        """A raw connection, through TLS where the server has it."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        if self.url.startswith("http:"):
            return plain
        context = client_context((self.state / "ca.pem").read_bytes())
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    def raw(self, text: bytes) -> bytes:
        """Send bytes, and read until the server has nothing more to say."""
        with self.connect() as link:
            link.sendall(text)
            return drain(link)

    def metrics(self) -> str:
        token = (self.state / "metrics.token").read_text()
        # A server that has stumbled closes the connection: then on another one.
        answer = self.pool.request(
            "GET", f"{self.url}/metrics", headers={"Authorization": f"Bearer {token}"}, retries=2
        )
        assert answer.status == 200
        return answer.data.decode()

    def refusals(self) -> dict[str, float]:
        """How much was refused, by reason."""
        pattern = r'^atoll_refusals_total\{reason="([^"]*)"\} ([0-9.e+]+)$'
        return {name: float(n) for name, n in re.findall(pattern, self.metrics(), re.M)}

    def answered(self, status: int) -> float:
        """How many requests were answered with this status."""
        pattern = rf'^atoll_request_seconds_count\{{.*status="{status}".*\}} ([0-9.e+]+)$'
        return sum(float(n) for n in re.findall(pattern, self.metrics(), re.M))

    def audit(self) -> list[dict[str, Any]]:
        """The audit log."""
        from atoll.service.storage.audit import lines

        store = StateFolder.open(self.state).store()
        try:
            with store.reading() as connection:
                return [
                    {"actor": line.actor, "event": line.event, **json.loads(line.detail)}
                    for line in lines(connection)
                ]
        finally:
            store.close()

    @contextlib.contextmanager
    def refusing(self, reason: str, actor: str = "", audited: bool = True) -> Iterator[None]:
        """What is done within is counted under this reason and, unless said, audited."""
        # The log takes twenty refusals a second; the suite is quicker than that.
        time.sleep(max(0.0, self._refills - time.monotonic()))
        self._refills = time.monotonic() + 0.06
        before, length = self.refusals().get(reason, 0.0), len(self.audit())
        yield
        assert self.refusals().get(reason, 0.0) > before, f"{reason!r} was not counted"
        if audited:
            new = self.audit()[length:]
            mine = [each for each in new if each.get("what") == reason]
            assert mine, f"{reason!r} was not audited: {new}"
            assert all(each["event"] == "refused" for each in mine)
            assert not actor or {each["actor"] for each in mine} == {actor}, mine

    def invite(self, name: str, role: str = "site", hours: float = 1.0) -> Token:
        return StateFolder.open(self.state).invite(name, role, hours)

    def insider(self, name: str, role: str = "site") -> Insider:
        """Somebody who was invited and has joined."""
        who = Insider(self, name)
        answer = who.enrol(self.invite(name, role))
        assert answer.status == 200, answer.data
        if role == "site":
            who.order()  # only who checks in is there
        return who

    def close(self) -> None:
        self.pool.clear()


@dataclass
class Insider:
    """A key with a name, that seals what it likes."""

    target: Target
    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)
    session: str = ""
    seal_key: bytes = field(default=b"", repr=False)
    counter: int = 0

    def enrol(self, token: Token, signer: Ed25519PrivateKey | None = None) -> Any:
        signature = (signer or self.key).sign(ENROL + bytes.fromhex(token.secret)).hex()
        return self.target.ask(
            "POST", "/v1/enrol",
            {"secret": token.secret, "key": public_key(self.key), "signature": signature},
        )  # fmt: skip

    def answer(self, signer: Ed25519PrivateKey | None = None, nonce: str = "") -> Any:
        """Ask for a challenge, and answer it."""
        if not nonce:
            asked = self.target.ask("POST", "/v1/challenge", {"site": self.name})
            nonce = json.loads(asked.data)["nonce"]
        signature = (signer or self.key).sign(OPEN + bytes.fromhex(nonce)).hex()
        body = {"site": self.name, "nonce": nonce, "signature": signature}
        return self.target.ask("POST", "/v1/session", body)

    def open(self) -> Insider:
        answer = self.answer()
        assert answer.status == 200, answer.data
        opened = json.loads(answer.data)
        self.session, self.seal_key = opened["session"], bytes.fromhex(opened["key"])
        self.counter = 0
        return self

    def headers(
        self, method: str, target: str, body: bytes | str = b"", *, counter: int | None = None
    ) -> dict[str, str]:
        """A good seal for a request."""
        if not self.session:
            self.open()
        if counter is None:
            self.counter += 1
            counter = self.counter
        text = body if isinstance(body, str) else sha256(body).hexdigest()
        return {
            "Atoll-Session": self.session,
            "Atoll-Counter": str(counter),
            "Atoll-Seal": seal(self.seal_key, method, target, counter, text),
        }

    def ask(self, method: str, target: str, body: Any = b"", headers=None, **more: Any) -> Any:
        """A sealed request."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        sealed = self.headers(method, target, body, **more)
        return self.target.ask(method, target, body or None, {**sealed, **(headers or {})})

    def greeting(self, **changed: Any) -> dict[str, Any]:
        plan = self.target.plan
        return {"plan": plan_digest(plan), "layout": plan.learner.layout.digest, **changed}

    def order(self, wait: float = 0, **changed: Any) -> dict[str, Any]:
        answer = self.ask("POST", f"/v1/checkin?wait={wait:g}", self.greeting(**changed))
        assert answer.status == 200, answer.data
        return json.loads(answer.data)

    def assignment(self, but: str = "") -> dict[str, Any]:
        """The next order to train; another than `but`."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            order = self.order(0.5)
            if order["kind"] == "train" and order["assignment"] != but:
                return order
            time.sleep(0.02)
        raise AssertionError(f"{self.name} was asked for nothing: {order}")

    def offer(self, assignment: str, size: int, digest: str, exchange: int = 0) -> Any:
        body = {"assignment": assignment, "size": size, "sha256": digest, "exchange": exchange}
        return self.ask("POST", "/v1/uploads", body)

    def patch(self, target: str, at: int, data: bytes) -> Any:
        headers = {"Upload-Offset": str(at), "Content-Length": str(len(data))}
        sealed = self.headers("PATCH", target, f"{at}:{len(data)}")
        return self.target.ask("PATCH", target, data, {**sealed, **headers})

    def upload(self, assignment: str, data: bytes, exchange: int = 0) -> Any:
        """Offer bytes and send them; the answer to the last request."""
        offered = self.offer(assignment, len(data), sha256(data).hexdigest(), exchange)
        if offered.status != 201:
            return offered
        return self.patch(offered.headers["Location"], 0, data)


class SealAuth(requests.auth.AuthBase):
    """Seals whatever `requests` is about to send."""

    def __init__(self, who: Callable[[], Insider]) -> None:
        self.who = who

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        insider = self.who()
        body: Any = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        target = urllib3.util.parse_url(request.url)
        text = sealed_target(target.path or "/", target.query or "")
        if request.method == "PATCH":
            at = request.headers.get("Upload-Offset", "")
            at = at.decode("latin-1") if isinstance(at, bytes) else at
            body = f"{at.strip()}:{request.headers.get('Content-Length', '')}"
        request.headers.update(insider.headers(request.method or "", text, body))
        return request


class Inner(Target):
    """A server in a thread of this process, without TLS, whose insides can be seen."""

    def __init__(self, root: Path, plan: Plan, database: str = "", **service: Any) -> None:
        folder = StateFolder.make(root / "state", "inner", ["127.0.0.1"])
        if database:
            folder.use_database(database)
        self.folder, self.service = folder, Service(**service)
        self.app = App(folder.authority, "inner", (folder.path / "metrics.token").read_text())
        self.loop: FederationLoop | None = None
        self._ready, self._stop = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._plan, self._port = plan, port
        self._thread = threading.Thread(target=self._run, name="inner-server")
        self._thread.start()
        assert self._ready.wait(20)
        if self._error is not None:
            raise self._error
        super().__init__(f"http://127.0.0.1:{port}", folder.path, plan)

    @property
    def failed(self) -> BaseException | None:
        """Why the server would have ended, if it would have."""
        assert self.loop is not None
        return self.loop.failed

    def rows(self, table: str) -> list[dict[str, Any]]:
        """What is in a table of the database."""
        store = self.folder.store()
        try:
            return [*store.rows(sa.select(metadata.tables[table]))]
        finally:
            store.close()

    def model(self) -> Vectors:
        """The latest model."""
        row = max(self.rows("versions"), key=lambda row: row["version"])
        digest = row["model"]
        data = (self.folder.path / "blobs" / digest[:2] / digest).read_bytes()
        return safetensors.decode(data)[0]

    def close(self) -> None:
        super().close()
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        import uvicorn

        store = Store(self.folder.database)
        assert store.lead()
        self.loop = loop = FederationLoop(
            self._plan, self.service, store, blobs_at(str(self.folder.path / "blobs")),
            self.folder.path / "incoming",
        )  # fmt: skip
        await loop.start()
        self.app.loop = loop
        config = http_config(self.app, "127.0.0.1", self._port, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        serving = asyncio.create_task(server.serve())
        while not self._stop.is_set():
            if server.started:
                self._ready.set()
            store.lead()
            if loop.failed is None:
                loop.tick()
            await asyncio.sleep(0.05)
        self.app.closing.set()
        loop.notify()
        server.should_exit = True
        await serving
        await loop.close()
        store.close()


def sealed_target(path: str, query: str = "") -> str:
    """What a seal covers of a path as it is written in a request."""
    return path + (f"?{query}" if query else "")


def request_bytes(
    method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> bytes:
    """A request as bytes, of which no library makes anything tidier."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body and "Content-Length" not in (headers or {}):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def drain(link: socket.socket) -> bytes:
    """Everything that comes until the other side closes or is silent."""
    taken = b""
    with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
        while piece := link.recv(65536):
            taken += piece
            if complete(taken):
                break
    return taken


def complete(answer: bytes) -> bool:
    """Whether these bytes are one whole HTTP answer."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: *(\d+)", head, re.M)
    return bool(found and length and len(body) >= int(length[1]))


def status_of(answer: bytes) -> int:
    """The status of a raw answer; 0 if the connection was closed without one."""
    match = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return int(match[1]) if match else 0


def error_of(answer: Any) -> str:
    """The sentence of a refusal, whether a problem or a verdict."""
    found = json.loads(answer.data)
    text = found.get("error") or found.get("reason")
    assert isinstance(text, str) and text, found
    return text


def packed(vectors: Mapping[str, Any], weight: float = 1.0, **metrics: float) -> bytes:
    """An update's bytes."""
    return b"".join(bytes(piece) for piece in pack(Update(dict(vectors), weight, {}, metrics)))
