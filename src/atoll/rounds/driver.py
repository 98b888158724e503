"""The driver: a federation's rounds, from invitation to step, without a clock, a wire or a disk.

The simulator and the service both run their rounds through it, and bring what it has not: time,
transport, durability. Open a round, ask, accept answers, fold them, hear, step: in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from atoll.aggregation.conversation import Ask, Conversation, Heard
from atoll.aggregation.stage import Accumulator
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Sender, Update
from atoll.core.vectors import Vector, Vectors
from atoll.errors import RunError
from atoll.rounds.buffered import BufferedCoordinator
from atoll.rounds.coordinator import Coordinator, Invitation
from atoll.rounds.plan import Plan
from atoll.rounds.schedules import Buffered, Schedule, Synchronous
from atoll.rounds.server import Server

#: Gives the parameters that a version's clients began from.
Began = Callable[[int], Vector]


class Driver:
    """One federation's rounds.

    Args:
        plan: what all parties agree on.
        key: of every draw that everyone may know; `secret` of what only the server may know.
        initial: the whole model to start from; None asks the learner.
    """

    def __init__(
        self, plan: Plan, key: Key, secret: Key | None = None, initial: Vectors | None = None
    ) -> None:
        self.plan = plan
        self.server = Server(plan, key, secret, initial)
        self.coordinator = coordinator_for(plan.schedule, key)
        self._talk: Conversation | None = None
        self._ask: Ask | None = None
        self._aggregate: Aggregate | None = None

    @property
    def open(self) -> bool:
        """Whether a question is open."""
        return self._ask is not None

    @property
    def ask(self) -> Ask:
        """The question that is open."""
        assert self._ask is not None, "no question is open"
        return self._ask

    @property
    def sums(self) -> Accumulator:
        """What the answers to the open question go into."""
        return self.ask.into

    def begin(
        self, round: int, members: Sequence[Sender], population: int, attempt: int = 0
    ) -> Ask:
        """Begin a round's conversation; what an abandoned attempt had gathered is dropped.

        Raises `CannotClose` if the reducer can ask these members nothing.
        """
        self._talk, self._aggregate = self.server.talk(round, members, population, attempt), None
        self._ask = next(self._talk)
        return self._ask

    def fold(self, update: Update, sender: Sender, staleness: int = 0) -> None:
        """Take an accepted answer into what the open question gathers."""
        self.sums.add(discounted(update, self.plan.schedule.discount(staleness)), sender)

    def hear(self, senders: Sequence[Sender]) -> Ask | None:
        """Everyone has answered who will: the next question, or None where there is an aggregate.

        Raises `CannotClose` if the reducer can make nothing of these answers.
        """
        assert self._talk is not None, "no round is open"
        heard = Heard(self.ask.into, tuple(senders))
        try:
            self._ask = self._talk.send(heard)
        except StopIteration as stop:
            self._ask, self._aggregate = None, stop.value
        return self._ask

    def step(
        self, round: int, accepted: Sequence[tuple[int, int]], began: Began, digest: str = ""
    ) -> dict[str, float]:
        """The server's step from the aggregate; returns the round's measurements.

        `accepted` are the version that each update began from and its staleness; `digest` is of
        the updates, for what is drawn in secret.
        """
        assert self._aggregate is not None, "the round has not been heard"
        schedule, pulled = self.plan.schedule, None
        if schedule.pull:
            ((version, staleness),) = accepted
            pulled = schedule.discount(staleness), began(version)
        aggregate, self._aggregate = self._aggregate, None
        measurements = self.server.close(round, aggregate, pulled, digest)
        if not schedule.lockstep:
            ages = [staleness for _, staleness in accepted]
            measurements |= {"staleness": float(np.mean(ages)), "most_stale": float(max(ages))}
        return measurements


def whom_of(ask: Ask, invitations: Sequence[Invitation]) -> list[Invitation]:
    """Those of the invited that a question goes to."""
    if ask.whom is None:
        return list(invitations)
    chosen = set(ask.whom)
    return [each for each in invitations if (each.client, each.turn) in chosen]


def discounted(update: Update, discount: float) -> Update:
    """The update with its vectors multiplied by the discount of a stale one."""
    if discount == 1:
        return update
    factor = np.float32(discount)
    scaled = {
        name: (factor * vector).astype(vector.dtype) for name, vector in update.vectors.items()
    }
    return replace(update, vectors=scaled)


def coordinator_for(schedule: Schedule, key: Key) -> Coordinator | BufferedCoordinator:
    """The state machine of a schedule."""
    if isinstance(schedule, Synchronous):
        return Coordinator(schedule, key)
    if isinstance(schedule, Buffered):
        return BufferedCoordinator(schedule, key)
    raise RunError(f"there is no coordinator for {schedule!r}")
