"""The asynchronous coordinator: some members are always at work, every K-th update makes a step.

Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022, algorithm
1; with a buffer of one it is FedAsync. Like its synchronous sibling it knows no clock, socket or
thread: names and times go in, answers come out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from atoll.core.random import Key
from atoll.errors import CheckpointError, ConfigurationError, RunError
from atoll.rounds.coordinator import Answer, Invitation, Outcome, Phase, Verdict
from atoll.rounds.roster import Roster
from atoll.rounds.schedules import Buffered


class BufferedCoordinator:
    """A buffer that fills over a roster.

    `round` is the step that the buffer fills for, counted from 1; `outcome` is the step that the
    last event completed, None if it completed none. The model after `round` - 1 steps is the
    newest version.
    """

    deadline: float | None = None
    attempt = step = 0

    def __init__(self, schedule: Buffered, key: Key) -> None:
        self.schedule = schedule
        self.phase = Phase.IDLE
        self.round = 1
        self.outcome: Outcome | None = None
        self._key = key
        self._turns = 0
        # Invitation: its client, and the version it began from.
        self._open: dict[str, tuple[str, int]] = {}
        self._buffer: list[str] = []
        # What became of the invitations that are over, for those who ask again: the last ones.
        self._past: dict[str, str] = {}

    @property
    def ready(self) -> bool:
        """Whether there is room for another member at work."""
        return self.phase in (Phase.IDLE, Phase.OPEN) and len(self._open) < (
            self.schedule.concurrency
        )

    @property
    def owed(self) -> tuple[str, ...]:
        """The invitations that are at work."""
        return tuple(self._open)

    @property
    def missing(self) -> int:
        """Updates that the buffer still waits for."""
        return self.schedule.buffer - len(self._buffer)

    def open(self, roster: Roster, now: float) -> tuple[Invitation, ...]:
        """Invite members where there is room, among those who are present and not at work."""
        if not self.ready:
            raise RunError(f"nobody can be invited while the coordinator is {self.phase}")
        if self.schedule.concurrency > len(roster):
            raise ConfigurationError(
                f"concurrency={self.schedule.concurrency} is more than the population of "
                f"{len(roster)} clients"
            )
        _time(now)
        self.phase, self.outcome = Phase.OPEN, None
        names = roster.names
        busy = {client for client, _ in self._open.values()}
        free = [m for m in roster.candidates().tolist() if names[m] not in busy]
        room = self.schedule.concurrency - len(self._open)
        key = self._key.fold("invite", self._turns)
        drawn = self.schedule.selection.draw(
            replace(roster, present=np.array(free, np.int64)), room, self.round, key
        )
        invitations = []
        for member in drawn.tolist():
            self._turns += 1
            id = f"{self.round}.{self._turns}.{member}"
            self._open[id] = names[member], self.round - 1
            invitations.append(
                Invitation(id, member, names[member], self.round, self._turns, 1.0, self._turns)
            )
        return tuple(invitations)

    def deliver(
        self, invitation: str, client: str, now: float, fault: str = "", step: int = 0
    ) -> Answer:
        """A client hands in its update; `fault` says what is wrong with it, if anything is."""
        _time(now)
        self.outcome = None
        refusal = self._refusal(invitation, client)
        if refusal is not None:
            return refusal
        _, version = self._open[invitation]
        staleness = self.round - 1 - version
        if fault:
            self._end(invitation, "refused")
            return Answer(
                Verdict.MALFORMED, f"the update of {client} was refused: {fault}", staleness
            )
        limit = self.schedule.limit
        if limit is not None and staleness > limit:
            self._end(invitation, "refused")
            return Answer(
                Verdict.STALE,
                f"the update of {client} is {staleness} versions old, and {limit} are accepted",
                staleness,
            )
        self._end(invitation, "accepted")
        self._buffer.append(invitation)
        if len(self._buffer) >= self.schedule.buffer:
            self.outcome = Outcome(True, self.round, 0, tuple(self._buffer))
            self._buffer = []
            self.round += 1
            if self.round > self.schedule.rounds:
                self.phase = Phase.DONE
        return Answer(Verdict.ACCEPTED, staleness=staleness)

    def lost(self, invitation: str, now: float) -> None:
        """A member will not deliver: its place is free."""
        _time(now)
        self.outcome = None
        if invitation in self._open:
            self._end(invitation, "lost")

    def tick(self, now: float) -> None:
        """Time has come to `now`; nothing here ends by time alone."""
        _time(now)
        self.outcome = None

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, ready for JSON."""
        return {
            "phase": str(self.phase),
            "round": self.round,
            "turns": self._turns,
            "open": {id: list(about) for id, about in self._open.items()},
            "buffer": list(self._buffer),
            "past": dict(self._past),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` gave."""
        try:
            self.phase = Phase(state["phase"])
            self.round, self._turns = int(state["round"]), int(state["turns"])
            self._open = {i: (str(c), int(v)) for i, (c, v) in state["open"].items()}
            self._buffer, self._past = list(state["buffer"]), dict(state["past"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the coordinator's state is damaged: {error!r}") from error
        # The schedule may have been given more rounds since, or fewer.
        if self.round > self.schedule.rounds:
            self.phase = Phase.DONE
        elif self.phase is Phase.DONE:
            self.phase = Phase.OPEN

    def _end(self, invitation: str, how: str) -> None:
        client, _ = self._open.pop(invitation)
        self._past[invitation] = f"{how} {client}"
        while len(self._past) > 4 * self.schedule.concurrency + self.schedule.buffer:
            del self._past[next(iter(self._past))]

    def _refusal(self, invitation: str, client: str) -> Answer | None:
        if invitation in self._open:
            if self._open[invitation][0] != client:
                return Answer(Verdict.UNKNOWN, f"{invitation!r} is not {client}'s invitation")
            if self.phase is Phase.DONE:
                self._end(invitation, "spared")
                return Answer(Verdict.NOT_NEEDED, "the run is done")
            return None
        how, _, owner = self._past.get(invitation, "").partition(" ")
        if owner and owner != client:
            return Answer(Verdict.UNKNOWN, f"{invitation!r} is not {client}'s invitation")
        if how == "accepted":
            return Answer(Verdict.DUPLICATE, f"the update of {client} was accepted before")
        if how:
            return Answer(Verdict.LATE, f"{client} was given up as {how}")
        return Answer(Verdict.UNKNOWN, f"nobody was invited as {invitation!r}")


def _time(now: float) -> None:
    if not math.isfinite(now):
        raise RunError(f"{now} is not a time")
