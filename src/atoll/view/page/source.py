"""What the page shows, whoever keeps it: run folders, or the history of a federation's server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from atoll.tracking.record import Closed, Participant

#: What may change at any time: status, total rounds, phase, failures, engine, and `epoch`, which is
#: another when the rounds so far are no longer those that were told of.
State = dict[str, Any]
#: Failures that are told of by name; the others are counted.
FAILURES = 50


class Unknown(Exception):
    """There is no such run or round."""


class Source(Protocol):
    """Runs and their rounds. A round's number is its id: later reads go on from it."""

    async def runs(self) -> Sequence[dict[str, Any]]:
        """id, name, status, round, total of each run, newest last."""

    async def about(self, run: str) -> dict[str, Any]:
        """What does not change: name, configuration, data, seed, environment."""

    async def since(self, run: str, round: int) -> tuple[Sequence[dict[str, Any]], State]:
        """Rounds after a round (see `row`), and the state now."""

    async def clients(self, run: str) -> Sequence[dict[str, Any]]:
        """Who took part: name, what `Totals` has of it, and metrics by name."""

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        """What `part` has of everyone who was invited to a round."""


def row(closed: Closed, *, served: bool) -> dict[str, Any]:
    """A closed round as the page has it; what is not known is None or missing."""
    plain = closed.record.json()
    plain |= {"up": plain.pop("bytes_up"), "down": plain.pop("bytes_down")}
    # The page takes a clock for simulated time.
    clock = None if served else plain["clock"]
    return {**plain, "clock": clock, "seconds": closed.seconds, "phases": dict(closed.phases)}


def part(each: Participant) -> dict[str, Any]:
    """A client's part in a round as the page has it."""
    return each._asdict()


def failures(refusals: Sequence[tuple[int, str]]) -> State:
    """What went wrong, as the state has it: the last ones, and how many there are."""
    last = [{"round": round, "text": text} for round, text in refusals[-FAILURES:]]
    return {"failures": last, "failed": len(refusals)}


class Totals:
    """What each client's parts in the rounds add up to; `last` is the last round it is in."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, int]] = defaultdict(
            lambda: {"accepted": 0, "missed": 0, "up": 0, "down": 0, "last": 0}
        )
        self.rounds = 0

    def add(self, rounds: Iterable[Closed]) -> None:
        """Count what these rounds add to those that were counted before."""
        for closed in rounds:
            for client, outcome, down, up in closed.participants:
                total = self.of[client]
                total["up"] += up
                total["down"] += down
                total["accepted" if outcome == "accepted" else "missed"] += 1
                if outcome == "accepted":
                    total["last"] = closed.record.round
            self.rounds += 1
