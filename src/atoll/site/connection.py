"""The link: a site's side of the wire, over HTTPS, outbound only.

Everything that may fail on the way is tried again, with growing pauses and jitter; whatever the
server decided is final. Requests are sealed; a lost session is opened anew.
"""

from __future__ import annotations

import math
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from atoll.core.files import file_digest, file_hash
from atoll.errors import AtollError, CheckpointError, ConfigurationError, require
from atoll.protocol import messages
from atoll.protocol.certificates import client_context, fingerprint
from atoll.protocol.identity import (
    ENROL,
    OPEN,
    IdentityError,
    Token,
    public_key,
    seal,
)

if TYPE_CHECKING:
    import urllib3
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CHUNK = 1 << 20
#: One first contact at a time.
FIRST_CONTACT = threading.Lock()
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 60.0
TIMEOUT = 30.0
#: Times that one request may be told that there is no such session, before that is believed.
TURNED_AWAY = 6
#: OpenSSL's words for a certificate that is not valid yet, and for one that has ended.
NOT_YET, OUT_OF_TIME = 9, frozenset({9, 10})
#: Times that something in between may refuse, before that is believed.
ELSEWHERE = 4
#: Names and addresses, IPv6 ones without their brackets.
HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?|[0-9A-Fa-f:.%]*:[0-9A-Fa-f:.%]*")
#: Refusals that time may cure.
PASSING = frozenset({408, 423, 425, 429, 500, 502, 503, 504, 507})


class Refusal(AtollError):
    """The server will not have it: its status, and its reason as the text.

    `ours` says that it was atoll's server, and not something in between, that answered.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        detail: Mapping[str, str] | None = None,
        *,
        ours: bool = True,
    ) -> None:
        self.status, self.detail, self.ours = status, dict(detail or {}), ours
        short = {name: value for name, value in self.detail.items() if len(value) < 200}
        about = ", ".join(f"{name}: {value}" for name, value in short.items())
        # Of a gateway's refusals some pass; the server means what it says.
        self.code = 4 if ours and status in (401, 403, 409) else 1
        super().__init__(f"{reason} ({about})" if about else reason)


class Unreachable(AtollError):
    """The server was not reached within the time that there was."""

    code = 5


class Stopped(AtollError):
    """The agent was asked to stop while it waited."""


@dataclass
class Connection:
    """A site's connection to its server.

    Args:
        url: "https://host:port", with the path that a proxy has it under, if it has.
        authority: the project's certificate (PEM); None trusts the system's authorities.
        key: the site's private key.
        site: its name; empty before it has joined.
        sleep: waits so many seconds; raises `Stopped` to give up.
        note: is told, in words, about what is tried again.
        patience: for how many seconds one request is tried; then `Unreachable`.
    """

    url: str
    authority: bytes | None
    key: Ed25519PrivateKey
    site: str = ""
    sleep: Callable[[float], None] = time.sleep
    note: Callable[[str], None] = lambda text: None
    patience: float = math.inf
    _session: str = ""
    _seal_key: bytes = field(default=b"", repr=False)
    _counter: int = 0

    def __post_init__(self) -> None:
        self.url = address(self.url)
        self._pool = _pool(client_context(self.authority), self.url)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def enrol(self, token: Token) -> messages.Enrolled:
        """Join with a one-time token: bind this key to the name that was invited."""
        secret = bytes.fromhex(token.secret)
        message = messages.Enrol(
            token.secret, public_key(self.key), self.key.sign(ENROL + secret).hex()
        )
        body = messages.write(message)
        answer = self._persist(lambda: self._send("POST", "/v1/enrol", body))
        enrolled = messages.read(messages.Enrolled, answer.data)
        self.site = enrolled.site
        return enrolled

    def check_in(
        self, message: messages.CheckIn, wait: float, timeout: float = TIMEOUT
    ) -> messages.Order:
        """Ask what to do, and wait up to so many seconds for an answer worth having."""
        body, target = messages.write(message), f"/v1/checkin?wait={wait:g}"
        answer = self._persist(lambda: self._sealed("POST", target, body, timeout=wait + timeout))
        return messages.read(messages.Order, answer.data)

    def ask(self, method: str, target: str) -> bytes:
        """Anything else that is asked without a body; returns the answer's."""
        data: bytes = self._persist(lambda: self._sealed(method, target, b"")).data
        return data

    def fetch(self, digest: str, size: int, path: Path) -> None:
        """Bring a blob into a file, going on where an earlier attempt was cut off."""
        partial = path.with_name(f"{path.name}.partial")

        def attempt() -> None:
            with _on_disk():
                have = partial.stat().st_size if partial.exists() else 0
            if have > size:
                partial.unlink()
                have = 0
            body = file_hash(partial) if have else sha256()
            if have < size:
                answer = self._sealed(
                    "GET", f"/v1/blobs/{digest}", b"", {"Range": f"bytes={have}-"}, stream=True
                )
                try:
                    with _on_disk():
                        file = partial.open("ab" if answer.status == 206 else "wb")
                    if answer.status != 206:
                        body = sha256()
                    with file:
                        for piece in answer.stream(CHUNK):
                            with _on_disk():
                                file.write(piece)
                            body.update(piece)
                finally:
                    answer.release_conn()
            if body.hexdigest() != digest:
                short = partial.stat().st_size < size
                if not short:
                    partial.unlink()
                raise ConnectionError(
                    "the model came cut off" if short else "the model came damaged"
                )

        self._persist(attempt)
        partial.replace(path)

    def upload(
        self, path: Path, assignment: str, exchange: int = 0, model: str | None = None
    ) -> messages.Verdict:
        """Send an update, going on where an earlier attempt was cut off; what became of it."""
        size, digest = path.stat().st_size, file_digest(path)
        offer = messages.write(messages.Offer(assignment, size, digest, exchange, model))

        def attempt() -> messages.Verdict:
            answer = self._sealed("POST", "/v1/uploads", offer)
            if answer.status == 200:
                return messages.read(messages.Verdict, answer.data)
            target, at = answer.headers["Location"], int(answer.headers["Upload-Offset"])
            while True:
                length = size - at
                with path.open("rb") as file:
                    file.seek(at)
                    headers = {"Upload-Offset": str(at), "Content-Length": str(length)}
                    # The seal covers place and length; the bytes are bound by the offer's digest.
                    answer = self._sealed(
                        "PATCH", target, f"{at}:{length}", headers, pieces=_pieces(file)
                    )
                if answer.status != 204:
                    return messages.read(messages.Verdict, answer.data)
                at = int(answer.headers["Upload-Offset"])

        verdict: messages.Verdict = self._persist(attempt)
        return verdict

    def measured(self, message: messages.Measured) -> None:
        """Say how good a model is here."""
        body = messages.write(message)
        self._persist(lambda: self._sealed("POST", "/v1/measured", body))

    def fail(self, assignment: str, reason: str) -> None:
        """Say that an update will not come."""
        body = messages.write(messages.Failure(reason[:1000]))
        self._persist(lambda: self._sealed("POST", f"/v1/assignments/{assignment}/fail", body))

    def _persist(self, attempt: Callable[[], Any]) -> Any:
        """Try until it works or is refused for good."""
        import urllib3

        pause, turned_away, elsewhere = FIRST_PAUSE, 0, 0
        until = time.monotonic() + self.patience
        while True:
            try:
                return attempt()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                distrust = _distrust(error)
                if distrust is not None and distrust.verify_code not in OUT_OF_TIME:
                    raise IdentityError(
                        f"{self.url} is not the project's server: {_reason(error)}"
                    ) from None
                # What is out of time today may have been renewed tomorrow, or a clock been set.
                reason = _reason(error) if distrust is None else _out_of_time(distrust)
            except Refusal as refusal:
                if refusal.status == 401 and self.site and turned_away < TURNED_AWAY:
                    # Sessions and challenges end, with the server or by themselves.
                    self._session = ""
                    turned_away += 1
                    if turned_away == 1:
                        continue
                elif not refusal.ours and elsewhere < ELSEWHERE:
                    # What is in between may be set up anew, and does not know what is settled.
                    elsewhere += 1
                elif (refusal.status not in PASSING and refusal.status != 409) or refusal.detail:
                    raise
                reason = str(refusal)
            if time.monotonic() + pause > until:
                raise Unreachable(f"{reason}; gave up after {self.patience:.0f} s")
            self.note(f"{reason}; trying again")
            self.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _sealed(
        self,
        method: str,
        target: str,
        body: bytes | str,
        headers: Mapping[str, str] | None = None,
        *,
        pieces: Iterator[bytes] | None = None,
        stream: bool = False,
        timeout: float = TIMEOUT,
    ) -> urllib3.BaseHTTPResponse:
        if not self._session:
            self._open_session()
        self._counter += 1
        text = body if isinstance(body, str) else sha256(body).hexdigest()
        sealed = {
            "Atoll-Session": self._session,
            "Atoll-Counter": str(self._counter),
            "Atoll-Seal": seal(self._seal_key, method, target, self._counter, text),
            **(headers or {}),
        }
        return self._send(
            method, target, pieces if pieces is not None else body, sealed, stream, timeout
        )

    def _open_session(self) -> None:
        asked = messages.write(messages.Challenge(self.site))
        answer = messages.read(messages.Challenge, self._send("POST", "/v1/challenge", asked).data)
        nonce = answer.nonce or ""
        signature = self.key.sign(OPEN + bytes.fromhex(nonce)).hex()
        body = messages.write(messages.OpenSession(self.site, nonce, signature))
        opened = messages.read(messages.SessionOpened, self._send("POST", "/v1/session", body).data)
        self._session, self._seal_key = opened.session, bytes.fromhex(opened.key)
        self._counter = 0

    def _send(
        self,
        method: str,
        target: str,
        body: Any,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        timeout: float = TIMEOUT,
    ) -> urllib3.BaseHTTPResponse:
        about = {"Content-Type": "application/json"} if isinstance(body, bytes) and body else {}
        answer = self._pool.request(
            method, self.url + target, body=body or None,
            headers={**about, **(headers or {})}, timeout=timeout, retries=False, redirect=False,
            preload_content=not stream,
        )  # fmt: skip
        if answer.status >= 400:
            data = answer.read(1 << 16) if stream else answer.data
            answer.release_conn()
            raise _refusal(answer.status, data)
        return answer


def first_contact(url: str, token: Token) -> bytes:
    """As `find_authority`, tried once; `Unreachable` says why the server was not there."""
    require("urllib3", "atoll[serve]", "a site's connection")
    import urllib3

    try:
        return find_authority(url, token)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unreachable(f"{_reason(error)}; start the server first") from error


def find_authority(url: str, token: Token) -> bytes:
    """The project's certificate, asked of a server that is not yet trusted, checked by the token.

    Nothing else is said on that connection.
    """
    import warnings

    require("urllib3", "atoll[serve]", "a site's connection")
    from urllib3.exceptions import InsecureRequestWarning

    server = address(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # Python's warnings are one for all threads.
    with FIRST_CONTACT, warnings.catch_warnings(), _pool(context, server) as pool:
        # The fingerprint in the token is the check that the warning misses.
        warnings.simplefilter("ignore", InsecureRequestWarning)
        answer = pool.request(
            "GET", f"{server}/v1/ca", timeout=TIMEOUT,
            retries=False, preload_content=False,
        )  # fmt: skip
        # Whoever answers is a stranger still.
        pem = bytes(answer.read(1 << 16, decode_content=False))
        answer.close()
    if answer.status != 200:
        # A proxy whose server is not there yet answers so.
        raise ConnectionError(f"{server} answered {answer.status}")
    if fingerprint(pem) != token.authority:
        raise IdentityError(
            f"{url} is not the server that the token was made for: it has another authority. "
            "Check the address, and who may be in between"
        )
    return pem


def address(url: str) -> str:
    """A server's address as "https://host:port/path", checked, without a slash at the end.

    Raises `ConfigurationError` for what can never be one.
    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port  # raises beyond 65535
    except ValueError as error:
        raise ConfigurationError(f"the server's address {url!r} cannot be: {error}") from None
    named = HOST.fullmatch(parts.hostname or "") and not parts.netloc.endswith(":")
    if parts.scheme != "https" or not named or port == 0:
        raise ConfigurationError(f"the server's address is https://HOST:PORT, not {url!r}")
    if parts.username or parts.query or parts.fragment:
        raise ConfigurationError(f"the server's address is https://HOST:PORT/PATH, not {url!r}")
    return f"https://{parts.netloc}{parts.path.rstrip('/')}"


@contextmanager
def _on_disk() -> Iterator[None]:
    """Trouble with this machine's own files is no trouble of the network, to be waited for."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'a file'} could not be written: {error.strerror or error}; free "
            "some space, then start again"
        ) from error


def _pool(context: Any, url: str) -> urllib3.PoolManager:
    """Connections to a server, through the proxy that HTTPS_PROXY names unless NO_PROXY does."""
    require("urllib3", "atoll[serve]", "a site's connection")
    import urllib3

    options = [*urllib3.connection.HTTPConnection.default_socket_options]
    options.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    more: dict[str, Any] = {"maxsize": 2, "socket_options": options}
    proxy = getproxies().get("https")
    if proxy is None or proxy_bypass(urlsplit(url).hostname or ""):
        return urllib3.PoolManager(ssl_context=context, **more)
    try:
        return urllib3.ProxyManager(proxy, ssl_context=context, **more)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise ConfigurationError(f"HTTPS_PROXY is {proxy!r}, which cannot be: {error}") from error


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(CHUNK):
        yield piece


def _refusal(status: int, data: bytes) -> Refusal:
    try:
        problem = messages.read(messages.Problem, data)
        return Refusal(status, problem.error, problem.detail)
    except messages.MessageError:
        pass
    try:
        verdict = messages.read(messages.Verdict, data)
        return Refusal(status, verdict.reason or verdict.verdict)
    except messages.MessageError:
        return Refusal(status, f"the server, or a proxy before it, answered {status}", ours=False)


def _distrust(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """Why the server's certificate was not believed, if that was the matter."""
    causes: list[object] = [error, error.__cause__, error.__context__, *error.args]
    return next((c for c in causes if isinstance(c, ssl.SSLCertVerificationError)), None)


def _out_of_time(error: ssl.SSLCertVerificationError) -> str:
    now = f"it is {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC by this machine's clock"
    if error.verify_code == NOT_YET:
        return f"the server's certificate is not valid yet; {now}: is it behind?"
    return f"the server's certificate has ended; {now}: has the server renewed it?"


def _reason(error: BaseException) -> str:
    return f"the server was not reached ({type(error).__name__}: {str(error)[:200]})"
