"""Identity: a site's key, enrolment tokens, and sessions whose requests are sealed.

A site is its Ed25519 key, made where it is and never moved. A one-time token binds the key to a
name. A signed challenge opens a session; each request is then sealed with HMAC-SHA256 under the
session's key over method, target, counter and body, and a counter is taken only once.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atoll.errors import AtollError, require
from atoll.protocol.certificates import write_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Role = Literal["site", "analyst", "admin"]
ROLES: tuple[Role, ...] = ("site", "analyst", "admin")

SESSION_SECONDS = 3600.0
CHALLENGE_SECONDS = 60.0
#: Sessions of one site that are good at the same time; the oldest makes way.
SESSIONS_EACH = 4
WINDOW = 64
ENROL, OPEN = b"atoll enrol ", b"atoll session "


class IdentityError(AtollError):
    """Someone is not who they say, or may not do what they ask."""

    code = 4


def read_identity(folder: Path) -> dict[str, str]:
    """What an identity's folder says in `site.json`: server, name and project.

    Raises `IdentityError` if that is damaged.
    """
    path = folder / "site.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise IdentityError(f"{path} cannot be read: {error}") from None
    known = found if isinstance(found, dict) else {}
    if not all(isinstance(known.get(name), str) for name in ("url", "site")):
        raise IdentityError(f"{path} is damaged: it names no server and no site; enrol anew")
    return {name: str(value) for name, value in known.items()}


def make_key(path: Path) -> Ed25519PrivateKey:
    """The key in this file, made if there is none."""
    require("cryptography", "atoll[serve]", "a site's key")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not path.exists():
        text = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_secret(path, text)
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path} does not hold an Ed25519 key")
    return key


def public_key(key: Ed25519PrivateKey) -> str:
    """The public half (hex), by which a site is known."""
    return key.public_key().public_bytes_raw().hex()


def verified(public: str, signature: str, message: bytes) -> bool:
    """Whether the holder of a public key signed a message (both hex)."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), message)
    except (ValueError, InvalidSignature):
        return False
    return True


@dataclass(frozen=True)
class Token:
    """What an invited site is given, out of band: a secret, and whom to trust."""

    secret: str
    authority: str

    @staticmethod
    def fresh(authority: str) -> Token:
        """A token with a new secret of 256 bits, for a project's authority."""
        return Token(secrets.token_hex(32), authority)

    def __str__(self) -> str:
        text = json.dumps([self.secret, self.authority], separators=(",", ":"))
        return "atoll-" + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @staticmethod
    def read(text: str) -> Token:
        """A token from its text."""
        body = text.strip().removeprefix("atoll-")
        try:
            secret, authority = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            if len(bytes.fromhex(secret)) != 32 or len(bytes.fromhex(authority)) != 32:
                raise ValueError
        except (ValueError, TypeError):
            raise IdentityError(
                "this is not an enrolment token; it begins with 'atoll-' and is made by: "
                "atoll invite STATE NAME"
            ) from None
        return Token(secret, authority)


def token_digest(secret: str) -> str:
    """What the server keeps of a token."""
    return sha256(b"atoll token " + secret.encode()).hexdigest()


def seal(key: bytes, method: str, target: str, counter: int, body: str) -> str:
    """The seal (hex) of a request; `body` is the body's SHA-256, or what stands for a stream."""
    text = f"{method}\n{target}\n{counter}\n{body}".encode()
    return hmac.new(key, text, sha256).hexdigest()


@dataclass
class Session:
    """One site's session; counters within the last 64 are taken in any order, each once."""

    id: str
    site: str
    role: Role
    public: str
    key: bytes = field(repr=False)
    expires: float
    highest: int = 0
    taken: int = 0

    def take(self, counter: int) -> bool:
        """Use a counter up; False if it was used before or is too old to know."""
        if counter > self.highest:
            self.taken = ((self.taken << min(counter - self.highest, WINDOW)) | 1) & (
                (1 << WINDOW) - 1
            )
            self.highest = counter
            return True
        back = self.highest - counter
        if back >= WINDOW or self.taken >> back & 1:
            return False
        self.taken |= 1 << back
        return True


class Sessions:
    """The sessions and challenges of one server process; a restart ends them all.

    Args:
        clock: seconds; monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._by_site: dict[str, list[str]] = {}
        self._secret = secrets.token_bytes(32)
        # Challenges that were answered, until they could no longer be.
        self._answered: dict[str, float] = {}

    def challenge(self, site: str) -> str:
        """Something to sign, known again without being kept: anyone may ask for as many."""
        return self._challenge(site, int(self._clock() * 1000) + 1, secrets.token_bytes(8))

    def answered(self, site: str, nonce: str) -> bool:
        """Whether this was asked of this site a moment ago; it cannot be answered twice."""
        now, given = self._clock(), bytes.fromhex(nonce)
        asked = int.from_bytes(given[:8], "big")
        fresh = 0 <= now - (asked - 1) / 1000 <= CHALLENGE_SECONDS
        mine = hmac.compare_digest(self._challenge(site, asked, given[8:16]), nonce)
        if not (fresh and mine) or nonce in self._answered:
            return False
        for old in [n for n, until in self._answered.items() if until < now]:
            del self._answered[old]
        self._answered[nonce] = now + CHALLENGE_SECONDS
        return True

    def _challenge(self, site: str, asked: int, salt: bytes) -> str:
        head = asked.to_bytes(8, "big") + salt
        return (head + hmac.new(self._secret, head + site.encode(), sha256).digest()[:16]).hex()

    def open(self, site: str, role: Role, public: str) -> Session:
        """A new session of the holder of this public key."""
        session = Session(
            secrets.token_hex(16), site, role, public, secrets.token_bytes(32),
            self._clock() + SESSION_SECONDS,
        )  # fmt: skip
        own = self._by_site.setdefault(site, [])
        own.append(session.id)
        while len(own) > SESSIONS_EACH:
            self._sessions.pop(own.pop(0), None)
        self._sessions[session.id] = session
        return session

    def find(self, id: str) -> Session | None:
        """A session that is still good."""
        session = self._sessions.get(id)
        if session is not None and self._clock() > session.expires:
            del self._sessions[id]
            self._by_site[session.site].remove(id)
            return None
        return session

    def __len__(self) -> int:
        return len(self._sessions)
