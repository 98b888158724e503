"""Observers: what is told about a run while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atoll.core.vectors import Vectors
from atoll.rounds.client_states import ClientStates
from atoll.tracking.record import Participant, Record, Run


@dataclass(frozen=True)
class Snapshot:
    """A run between two rounds: everything that is needed to go on from there."""

    round: int
    vectors: Vectors
    states: ClientStates
    coordinator: Mapping[str, Any]
    clock: float


@dataclass(frozen=True)
class RoundEnd:
    """What observers are told when a round has closed.

    `participants` covers all its attempts. `snapshot` holds until the next round closes. `phases`
    are the real seconds of its parts, as far as they were measured.
    """

    record: Record
    participants: Sequence[Participant]
    snapshot: Snapshot
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


class Observer:
    """Is told how a run goes; the defaults do nothing."""

    def begin(self, run: Run) -> None:
        """The run is about to start (or to go on)."""

    def round(self, run: Run, end: RoundEnd) -> None:
        """A round has closed."""

    def interrupted(self, run: Run, snapshot: Snapshot) -> None:
        """The run ends before its time; `snapshot` is the state after its last closed round."""

    def end(self, run: Run) -> None:
        """The run is complete."""

    def close(self) -> None:
        """Nothing more will come, whatever happened."""
