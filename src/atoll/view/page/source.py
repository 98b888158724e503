"""What the page shows, whoever keeps it: run folders, or the store of a federation's server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

#: One closed round: round, metrics, measurements, invited, accepted, attempts, up, down (bytes),
#: clock, seconds, phases. What is not known is None or missing.
Row = dict[str, Any]
#: What may change at any time: status, total rounds, phase, failures, engine, and `epoch`, which is
#: another when the rounds so far are no longer those that were told of.
State = dict[str, Any]


class Unknown(Exception):
    """There is no such run or round."""


class Source(Protocol):
    """Runs and their rounds. A round's number is its id: later reads go on from it."""

    async def runs(self) -> Sequence[dict[str, Any]]:
        """id, name, status, round, total of each run, newest last."""

    async def about(self, run: str) -> dict[str, Any]:
        """What does not change: name, configuration, data, seed, environment."""

    async def since(self, run: str, round: int) -> tuple[Sequence[Row], State]:
        """Rows after a round, and the state now."""

    async def clients(self, run: str) -> Sequence[dict[str, Any]]:
        """Who took part: name, accepted, missed, up, down, last (round), and metrics by name."""

    async def participants(self, run: str, round: int) -> Sequence[dict[str, Any]]:
        """client, outcome, up, down of everyone who was invited to a round."""
