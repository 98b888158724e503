"""Examples: inputs and targets side by side, the unit that learners are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
#: One array [N, ...], or several of equal length by name.
Inputs = NDArray[Any] | dict[str, NDArray[Any]]
#: The shape of one input, or of each by name.
Shape = tuple[int, ...] | dict[str, tuple[int, ...]]
T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """Rows of columns that may be shared with many other clients.

    `x` [N, ...] and `y` [N, ...] are whole columns, `x` perhaps several by name; `rows` [n] picks
    this holder's rows (None: all of them). Nothing is copied until a batch is taken.
    """

    x: Inputs
    y: NDArray[Any]
    rows: Rows | None = None

    def __len__(self) -> int:
        return length(self.x) if self.rows is None else len(self.rows)

    def at(self, positions: Rows | slice) -> Rows | slice:
        """Row numbers in the whole columns of these positions among this holder's rows."""
        return positions if self.rows is None else self.rows[positions]

    def take(self, positions: Rows | slice) -> tuple[Any, NDArray[Any]]:
        """Inputs (an array, or a dict of them) and targets of the examples at these positions."""
        rows = self.at(positions)
        return picked(self.x, rows), self.y[rows]

    def all(self) -> tuple[Any, NDArray[Any]]:
        """Every input and target, gathered."""
        return self.take(slice(None))


def length(x: Any) -> int:
    """How many examples inputs hold, of any framework."""
    return len(next(iter(x.values())) if isinstance(x, dict) else x)


def of_each(x: Any, make: Callable[[Any], T]) -> Any:
    """What is made of the array of inputs, or of each of them by name."""
    return {name: make(one) for name, one in x.items()} if isinstance(x, dict) else make(x)


def picked(x: Any, rows: Any) -> Any:
    """These rows of inputs."""
    return of_each(x, lambda column: column[rows])


def shape_of(x: Inputs) -> Shape:
    """Shape of one input, or of each by name."""
    found: Shape = of_each(x, lambda column: tuple(column.shape[1:]))
    return found


def shape_text(shape: Shape) -> str:
    """A shape, or one of each name, for people."""
    if isinstance(shape, dict):
        return ", ".join(f"{name} {list(each)}" for name, each in shape.items())
    return str(list(shape))


def columns_of(x: Inputs) -> list[tuple[str, NDArray[Any]]]:
    """The columns of inputs by name; one that stands alone has none."""
    return list(x.items()) if isinstance(x, dict) else [("", x)]


def stacked(parts: Sequence[Any]) -> Inputs:
    """Inputs one after the other; those with names all have the same."""
    first: Any = parts[0]
    if not isinstance(first, dict):
        return np.concatenate([np.asarray(part) for part in parts])
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in first}


def as_inputs(x: Any) -> Any:
    """Inputs with names as the plain dict that they are told by."""
    return dict(x) if isinstance(x, Mapping) else x


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several holders one after the other; shared columns are not copied."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(part.x is first.x and part.y is first.y for part in parts):
        rows = [np.arange(len(first.y)) if p.rows is None else p.rows for p in parts]
        return Examples(first.x, first.y, np.concatenate(rows))
    columns = [part.all() for part in parts]
    return Examples(stacked([x for x, _ in columns]), np.concatenate([y for _, y in columns]))
