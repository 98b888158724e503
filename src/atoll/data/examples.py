"""Examples: inputs and targets side by side, the unit that learners are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: classification: y [N] int64 in [0, classes); regression: y [N] or [N, D] float32;
#: tokens: x and y [N, T] int64 in [0, classes), y being the token that follows.
Task = Literal["classification", "regression", "tokens"]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """Rows of two columns that may be shared with many other clients.

    `x` [N, ...] and `y` [N, ...] are whole columns; `rows` [n] picks this holder's rows
    (None: all of them). Nothing is copied until a batch is taken.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    rows: Rows | None = None

    def __len__(self) -> int:
        return len(self.x) if self.rows is None else len(self.rows)

    def at(self, positions: Rows | slice) -> Rows | slice:
        """Row numbers in the whole columns of these positions among this holder's rows."""
        return positions if self.rows is None else self.rows[positions]

    def take(self, positions: Rows | slice) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and targets of the examples at these positions."""
        rows = self.at(positions)
        return self.x[rows], self.y[rows]

    def all(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Every input and target, gathered."""
        return self.take(slice(None))


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several holders one after the other; shared columns are not copied."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(part.x is first.x and part.y is first.y for part in parts):
        rows = [np.arange(len(first.x)) if p.rows is None else p.rows for p in parts]
        return Examples(first.x, first.y, np.concatenate(rows))
    columns = [part.all() for part in parts]
    return Examples(
        np.concatenate([x for x, _ in columns]), np.concatenate([y for _, y in columns])
    )
