"""The coordinator: the round as a state machine without clocks, sockets or threads.

Events go in with the time at which they happened; answers come out. The simulator feeds it a
virtual clock and the server a real one. It handles names and times only: vectors are the server's.

A round goes: open -> (deliver | lost | tick)* -> heard, and then whoever drives it says what
follows: another question to those who answered (`ask`), the round's end (`finish`), or that
nothing can be made of the answers (`abandon`). A question ends when enough answers are accepted,
when everyone asked has answered or is lost, or at the deadline. Whoever drives it without a
deadline must report as lost, sooner or later, every member that will not deliver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from atoll.core.random import Key
from atoll.errors import CheckpointError, ConfigurationError, RunError
from atoll.rounds.roster import Roster
from atoll.rounds.schedules import Synchronous


class Phase(StrEnum):
    IDLE = "idle"
    OPEN = "open"
    #: A question has ended with enough answers, and it is not yet said what follows.
    HEARD = "heard"
    DONE = "done"
    FAILED = "failed"


class Verdict(StrEnum):
    """What became of a delivery."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    NOT_NEEDED = "no longer needed"
    UNKNOWN = "unknown"
    MALFORMED = "malformed"
    STALE = "too stale"


class Invitation(NamedTuple):
    """One member's part in one round; its `id` is what a delivery must quote.

    It begins from the model after `round` - 1 rounds. `turn` is what its random draws are keyed
    by: a retried round repeats them, and a second turn in the same round does not.
    """

    id: str
    member: int
    client: str
    round: int
    attempt: int
    fraction: float
    turn: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The verdict on a delivery, and why, in words.

    `staleness` is by how many versions the model has moved on since the member began.
    """

    verdict: Verdict
    reason: str = ""
    staleness: int = 0

    @property
    def accepted(self) -> bool:
        return self.verdict is Verdict.ACCEPTED


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt at a round ended; `closed` with these updates, or abandoned for a reason."""

    closed: bool
    round: int
    attempt: int
    accepted: tuple[str, ...]
    reason: str = ""


class Coordinator:
    """Synchronous rounds over a roster.

    `round` is the round that is open or comes next, counted from 1, and `step` the question of it
    that is open, from 0; `outcome` is how the last attempt ended, None while one is open.
    """

    def __init__(self, schedule: Synchronous, key: Key) -> None:
        self.schedule = schedule
        self.phase = Phase.IDLE
        self.round, self.attempt = 1, 0
        self.deadline: float | None = None
        self.outcome: Outcome | None = None
        self._key = key
        self._needed = self._fewest = 0
        self._open: dict[str, str] = {}
        self._accepted: dict[str, str] = {}
        self._lost: set[str] = set()
        self._faults: list[str] = []
        self.step = 0
        #: Those whose updates are in the aggregate: they answered the question that is worked for.
        self._worked: dict[str, str] = {}

    @property
    def heard(self) -> tuple[str, ...]:
        """The invitations that have answered the open question, in the order of the roster."""
        return _in_order(self._accepted)

    @property
    def asked(self) -> tuple[str, ...]:
        """The invitations that the open question went to, in the order of the roster."""
        return _in_order(self._open)

    @property
    def owed(self) -> tuple[str, ...]:
        """The invitations that have neither answered the open question nor are lost."""
        gone = self._lost | set(self._accepted)
        return tuple(id for id in self.asked if id not in gone)

    @property
    def ready(self) -> bool:
        """Whether `open` may be called."""
        return self.phase is Phase.IDLE

    @property
    def missing(self) -> int:
        """Updates that the open round still waits for."""
        return self._needed - len(self._accepted)

    def open(self, roster: Roster, now: float) -> tuple[Invitation, ...]:
        """Begin the next attempt: draw a cohort and invite it.

        An empty cohort abandons the attempt at once: look at `outcome`.
        """
        if self.phase is not Phase.IDLE:
            raise RunError(f"a round cannot be opened while the coordinator is {self.phase}")
        schedule = self.schedule
        population = len(roster)
        self._needed, self._fewest = schedule.needed(population), schedule.fewest(population)
        if self._fewest > population:
            raise ConfigurationError(
                f"minimum={self._fewest} is more than the population of {population} clients"
            )
        key = self._key.fold("cohort", self.round, self.attempt)
        drawn = schedule.selection.draw(roster, schedule.invited(population), self.round, key)
        if schedule.sampling().kind == "poisson":
            self._needed = len(drawn)
        round, attempt, names = self.round, self.attempt, roster.names
        capacity = roster.capacity if schedule.adaptive else None
        invitations = tuple(
            Invitation(
                f"{round}.{attempt}.{member}",
                member,
                names[member],
                round,
                attempt,
                1.0 if capacity is None else min(capacity(member), 1.0),
                round,
            )
            for member in drawn.tolist()
        )
        self.phase, self.outcome = Phase.OPEN, None
        self.deadline = None if schedule.deadline is None else now + schedule.deadline
        self._open = {invitation.id: invitation.client for invitation in invitations}
        self._accepted, self._lost, self._faults = {}, set(), []
        self.step, self._worked = 0, {}
        self._settle()
        return invitations

    def need(self, fewest: int, whom: Sequence[str] | None = None) -> None:
        """The open question is of no use with fewer answers, and goes to these alone, if given."""
        if whom is not None:
            self._open = {id: self._open[id] for id in whom}
            self._needed = min(self._needed, len(self._open))
        self._fewest = max(self._fewest, fewest)
        self._settle()

    def ask(self, fewest: int, whom: Sequence[str], now: float) -> None:
        """Put the next question, to these of those who answered the last one."""
        self._must_be_heard("asked")
        self.phase, self.step = Phase.OPEN, self.step + 1
        self._open = {id: self._accepted[id] for id in whom}
        self._accepted, self._lost = {}, set()
        self._needed, self._fewest = len(self._open), fewest
        deadline = self.schedule.deadline
        self.deadline = None if deadline is None else now + deadline
        self._settle()

    def worked(self) -> None:
        """Those who answered this question are those whose updates are in the aggregate."""
        self._worked = dict(self._accepted)

    def finish(self) -> None:
        """There is no further question: the round closes."""
        self._must_be_heard("finished")
        self._accepted = dict(self._worked)
        self._conclude(True, "")

    def abandon(self, reason: str) -> None:
        """Nobody can be asked, or nothing made of the answers: the attempt is over."""
        if self.phase not in (Phase.OPEN, Phase.HEARD):
            raise RunError(f"nothing can be abandoned while the coordinator is {self.phase}")
        self._conclude(False, reason)

    def deliver(
        self, invitation: str, client: str, now: float, fault: str = "", step: int = 0
    ) -> Answer:
        """A client answers a question; `fault` says what is wrong with its answer, if anything is.

        A faulty update is refused and its client counts as lost, so it cannot be tried again.
        """
        self._expire(now, self.deadline is not None and now > self.deadline)
        if self.step != step and self._open.get(invitation) == client:
            late = step < self.step
            reason = f"question {step} is over; {client} came too late"
            return Answer(
                Verdict.LATE if late else Verdict.UNKNOWN,
                reason if late else f"question {step} has not been asked",
            )
        refusal = self._refusal(invitation, client)
        if refusal is not None:
            return refusal
        if fault:
            self._faults.append(fault)
            self.lost(invitation, now)
            return Answer(Verdict.MALFORMED, f"the update of {client} was refused: {fault}")
        self._accepted[invitation] = client
        self._settle()
        return Answer(Verdict.ACCEPTED)

    def lost(self, invitation: str, now: float) -> None:
        """A member will not deliver: it dropped out, or its lease ran out."""
        self._expire(now, self.deadline is not None and now > self.deadline)
        if self.phase is Phase.OPEN and invitation in self._open:
            if invitation not in self._accepted:
                self._lost.add(invitation)
            self._settle()

    def tick(self, now: float) -> None:
        """Time has come to `now`; a round ends at its deadline, after what is delivered then."""
        self._expire(now, self.deadline is not None and now >= self.deadline)

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, ready for JSON."""
        return {
            "phase": str(self.phase),
            "round": self.round,
            "attempt": self.attempt,
            "deadline": self.deadline,
            "needed": self._needed,
            "fewest": self._fewest,
            "open": dict(self._open),
            "accepted": dict(self._accepted),
            "lost": sorted(self._lost),
            "faults": list(self._faults),
            "step": self.step,
            "worked": dict(self._worked),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` gave."""
        try:
            self.phase = Phase(state["phase"])
            self.round, self.attempt = int(state["round"]), int(state["attempt"])
            self.deadline = state["deadline"]
            self._needed, self._fewest = int(state["needed"]), int(state["fewest"])
            self._open, self._accepted = dict(state["open"]), dict(state["accepted"])
            self._lost, self._faults = set(state["lost"]), list(state["faults"])
            self.step, self._worked = int(state["step"]), dict(state["worked"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the coordinator's state is damaged: {error!r}") from error
        if self.phase is Phase.FAILED and self.attempt < self.schedule.attempts:
            self.phase = Phase.IDLE
        if self.phase in (Phase.IDLE, Phase.DONE):
            # The schedule may have been given more rounds since, or fewer.
            self.phase = Phase.DONE if self.round > self.schedule.rounds else Phase.IDLE

    def _refusal(self, invitation: str, client: str) -> Answer | None:
        if invitation not in self._open:
            past = self._past(invitation)
            if past:
                return Answer(Verdict.LATE, f"{past} is over; the update of {client} came too late")
            return Answer(Verdict.UNKNOWN, f"nobody was invited as {invitation!r}")
        if self._open[invitation] != client:
            return Answer(Verdict.UNKNOWN, f"{invitation!r} is not {client}'s invitation")
        if invitation in self._accepted:
            return Answer(Verdict.DUPLICATE, f"the update of {client} was accepted before")
        if self.phase is not Phase.OPEN:
            enough = len(self._accepted) >= self._needed
            if enough:
                return Answer(Verdict.NOT_NEEDED, f"the round has the {self._needed} it needs")
            return Answer(Verdict.LATE, f"the round is over; {client} came too late")
        if invitation in self._lost:
            return Answer(Verdict.LATE, f"{client} was given up as lost")
        return None

    def _past(self, invitation: str) -> str:
        """Which earlier attempt an invitation belongs to, if its form says so."""
        parts = invitation.split(".")
        if len(parts) != 3 or not all(part.isdecimal() and len(part) < 16 for part in parts):
            return ""
        round, attempt = int(parts[0]), int(parts[1])
        earlier = (round, attempt) < (self.round, self.attempt) and round >= 1
        return f"round {round}" if earlier else ""

    def _expire(self, now: float, due: bool) -> None:
        if not math.isfinite(now):
            raise RunError(f"{now} is not a time")
        if due and self.phase is Phase.OPEN:
            self._end(f"the deadline passed with {len(self._accepted)} of {self._needed} updates")

    def _settle(self) -> None:
        """End the round if there is nothing left to wait for."""
        if self.phase is not Phase.OPEN:
            return
        accepted, possible = len(self._accepted), len(self._open) - len(self._lost)
        if accepted >= self._needed or possible == accepted or possible < self._fewest:
            self._end(
                f"at most {possible} of {len(self._open)} invited clients could still deliver, "
                f"and at least {self._fewest} updates are needed"
            )

    def _end(self, reason: str) -> None:
        if len(self._accepted) >= self._fewest:
            self.phase = Phase.HEARD
        else:
            self._conclude(False, reason)

    def _conclude(self, closed: bool, reason: str) -> None:
        if self._faults:
            reason += f"; {len(self._faults)} updates were refused, the first: {self._faults[0]}"
        reason = "" if closed else reason
        self.outcome = Outcome(closed, self.round, self.attempt, self.heard, reason)
        if closed:
            self.round, self.attempt = self.round + 1, 0
            self.phase = Phase.DONE if self.round > self.schedule.rounds else Phase.IDLE
        else:
            self.attempt += 1
            self.phase = Phase.FAILED if self.attempt >= self.schedule.attempts else Phase.IDLE

    def _must_be_heard(self, what: str) -> None:
        if self.phase is not Phase.HEARD:
            raise RunError(f"nothing can be {what} while the coordinator is {self.phase}")


def _in_order(invitations: Iterable[str]) -> tuple[str, ...]:
    """Invitations by the number of their member, which is the order of the roster."""
    return tuple(sorted(invitations, key=lambda id: int(id.rpartition(".")[2])))
