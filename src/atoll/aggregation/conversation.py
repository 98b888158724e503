"""A round as a conversation: a rule that asks several questions writes them down as a generator.

It yields an `Ask` and is sent what was `Heard`; what it returns is the round's aggregate. It is a
function of what it is given and draws only from its key, so it is never stored: after a crash it
is run again over the answers that were kept, to the same point. Replay grows with the questions;
what takes hundreds of them is many rounds.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atoll.aggregation.schema import Schema
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Sender
from atoll.core.vectors import Vectors

if TYPE_CHECKING:
    from atoll.aggregation.stage import Accumulator


@dataclass(frozen=True, eq=False)
class Ask:
    """One question, and what the answers go into.

    `told` is the same for everyone, `mail` for one of them alone; an answer is of `schema`. With
    `works` it is the question that clients train for. It goes to `whom`, or to all who answered
    the one before; of those at least `fewest` must answer, or the attempt is abandoned. `owner`
    says whose question it is, and `given` is what an algorithm tells those who work; both are
    filled in by whoever drives.
    """

    name: str
    into: Accumulator
    schema: Schema
    told: Vectors = field(default_factory=dict)
    mail: Mapping[Sender, Vectors] = field(default_factory=dict)
    works: bool = False
    whom: tuple[Sender, ...] | None = None
    fewest: int = 1
    owner: str = "reducer"
    given: Vectors = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Heard:
    """The answers to an `Ask`, and whose they are, in the order of the roster."""

    into: Accumulator
    senders: tuple[Sender, ...]


@dataclass(frozen=True, eq=False)
class Talk:
    """What a conversation may know: whom it is with, how many there are in all, its own state."""

    members: tuple[Sender, ...]
    population: int
    state: Vectors
    key: Key


Conversation = Generator[Ask, Heard, Aggregate]
