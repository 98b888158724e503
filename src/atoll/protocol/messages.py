"""Messages: the closed schemas of what is said in JSON, in both directions.

Anything that is not exactly of its schema is refused: unknown fields, wrong types, long strings.
The OpenAPI description is derived from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from atoll import __version__
from atoll.errors import AtollError

BODY_LIMIT = 1 << 16

#: `$` alone would let a line break through at the end.
Name = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9])?$(?![\s\S])", max_length=64),
]
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?![\s\S])", max_length=64)]
Hex16 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?![\s\S])", max_length=32)]
Hex64 = Annotated[str, Meta(pattern=r"^[0-9a-f]{128}$(?![\s\S])", max_length=128)]
AssignmentId = Annotated[
    str, Meta(pattern=r"^[0-9]{1,12}\.[0-9]{1,12}\.[0-9]{1,12}$(?![\s\S])", max_length=38)
]
Text = Annotated[str, Meta(max_length=1000)]
#: What others say in words, or of themselves: no control characters.
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$(?![\s\S])"
Words = Annotated[str, Meta(max_length=1000, pattern=PLAIN)]
Label = Annotated[str, Meta(max_length=64, pattern=PLAIN)]
Value = Annotated[str, Meta(max_length=256, pattern=PLAIN)]
Count = Annotated[int, Meta(ge=0, le=1 << 48)]


class MessageError(AtollError):
    """A message that is not of its schema."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages: no field more and none less."""


class Enrol(Message, frozen=True):
    """A site presents its token and its key; `signature` is over "atoll enrol " and the secret."""

    secret: Hex32
    key: Hex32
    signature: Hex64


class Enrolled(Message, frozen=True):
    """What a site is called, and in which project."""

    site: Name
    role: Literal["site", "analyst", "admin"]
    project: Text


class Challenge(Message, frozen=True):
    """A site that wants a session, or the number it is to sign for one."""

    site: Name
    nonce: Hex32 | None = None


class OpenSession(Message, frozen=True):
    """The answer to a challenge; `signature` is over "atoll session " and the number."""

    site: Name
    nonce: Hex32
    signature: Hex64


class SessionOpened(Message, frozen=True):
    """A session: its name, its key (hex) for seals, and for how many seconds it is good."""

    session: Text
    key: Hex32
    seconds: float


class CheckIn(Message, frozen=True):
    """A site is there, and what it wants to say of itself.

    `busy` names the assignment it is at work on, and asks for nothing but whether it still counts.
    It holds `held_out` examples out, to measure models on. `plan` and `layout` are the digests of
    its own copy of the federation, `meaning` that of the names of its inputs, classes and label,
    which it may also tell. `agent` is drawn when an agent starts.
    """

    plan: Hex32
    layout: Hex32
    examples: Count = 0
    busy: AssignmentId | None = None
    farewell: bool = False
    about: Annotated[dict[Label, Value], Meta(max_length=16)] = {}
    agent: Hex16 | None = None
    held_out: Count = 0
    meaning: Hex32 | None = None
    inputs: Annotated[list[Value], Meta(max_length=256)] = []
    classes: Annotated[list[Value], Meta(max_length=256)] = []
    target: Value = ""


class Order(Message, frozen=True):
    """What a site is to do: train, wait (between so many seconds), go on, drop it, or stop.

    For "train": how often to say that work goes on (`wait`), the model's blob and size, the random
    numbers' seed, and `memory`, the assignment whose memory counts (None: it begins anew). It is
    the question number `exchange` of the round, called `question`, and whose `owner` is; only with
    `works` is there local work to do. `told` and `mail` are blobs that belong to it. For "stop":
    the final model, if there is one, and how the federation has ended. For "measure": the model of
    a round, of which it is to say how good it is on rows that it holds out.
    """

    kind: Literal["train", "measure", "wait", "go on", "drop", "stop"]
    assignment: AssignmentId | None = None
    round: Count = 0
    rounds: Count = 0
    turn: Count = 0
    fraction: float = 1.0
    seed: int = 0
    model: Hex32 | None = None
    size: Count = 0
    memory: AssignmentId | None = None
    exchange: Count = 0
    question: Label = "update"
    owner: Literal["reducer", "algorithm"] = "reducer"
    works: bool = True
    told: Hex32 | None = None
    told_size: Count = 0
    mail: Hex32 | None = None
    mail_size: Count = 0
    wait: tuple[float, float] = (0.0, 0.0)
    reason: Text = ""
    outcome: Literal["", "done", "stopped", "given up"] = ""


class Measured(Message, frozen=True):
    """How good the model of a round is on the `examples` that a site holds out, by metric."""

    round: Count
    examples: Count
    figures: Annotated[dict[Label, float], Meta(max_length=64)]


class Offer(Message, frozen=True):
    """An upload that is about to come: for which assignment, how long, and its SHA-256.

    `exchange` is the number of the question that it answers, `model` the beginning of the digest of
    the model that the site had before it: after a restore rounds are done again, under their names.
    """

    assignment: AssignmentId
    size: Annotated[int, Meta(ge=1, le=1 << 48)]
    sha256: Hex32
    exchange: Count = 0
    model: Hex16 | None = None


class Verdict(Message, frozen=True):
    """What became of an update."""

    verdict: Text
    reason: Text = ""


class Failure(Message, frozen=True):
    """Why a site cannot do what it was asked to, in words."""

    reason: Words


class Login(Message, frozen=True):
    """A browser brings a ticket for the live page."""

    ticket: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{43}$(?![\s\S])", max_length=43)]


#: Where a refusal's detail holds the server's plan, described in JSON.
PLAN = "plan"


class Problem(Message, frozen=True):
    """Why a request was refused, and what to do about it."""

    error: Text
    detail: dict[str, str] = {}


M = TypeVar("M", bound=Message)


def read(kind: type[M], body: bytes) -> M:
    """A message of this schema; raises `MessageError` saying what does not fit."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MessageError(
            f"the body is no {kind.__name__} message: {error}; this is atoll {__version__}, and "
            "the other side may be another version"
        ) from None


def write(message: Message) -> bytes:
    """The message as JSON."""
    return msgspec.json.encode(message)


def schemas() -> dict[str, Any]:
    """JSON schemas of all messages, by name."""
    kinds = sorted(Message.__subclasses__(), key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    return dict(components)
