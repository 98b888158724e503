"""The roster: who could be invited to a round, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Members = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Resources:
    """What members report about their devices, one entry per member.

    `speed` is local steps per second; NaN where it is not known.
    """

    charging: NDArray[np.bool_]
    unmetered: NDArray[np.bool_]
    speed: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Roster:
    """A population of members numbered from 0.

    Args:
        names: the name of each member.
        examples: training examples each member holds (or says it holds).
        present: the members that can be invited now; None for all of them.
        resources: what they report about their devices, if they do.
        capacity: gives the share of the full local work that a member can do by the deadline, in
            (0, 1]; None if nobody says.
    """

    names: Sequence[str]
    examples: NDArray[np.int64]
    present: Members | None = None
    resources: Resources | None = None
    capacity: Callable[[int], float] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def candidates(self) -> Members:
        """The members that can be invited now."""
        return np.arange(len(self)) if self.present is None else self.present
