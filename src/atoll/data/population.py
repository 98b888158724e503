"""Populations of any size: clients that are numbered, and data that are made or mapped when used.

Nothing here holds an object per client: a million clients cost the array of their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.data.examples import (
    Examples,
    Inputs,
    Rows,
    as_inputs,
    columns_of,
    length,
    of_each,
    picked,
    shape_of,
    shape_text,
)
from atoll.data.federated import FederatedData
from atoll.data.tasks import Task, named_input, task_of
from atoll.errors import DataError

#: Makes one client's inputs and targets from its number and its generator.
Make = Callable[[int, np.random.Generator], tuple[Inputs, NDArray[Any]]]


@dataclass(frozen=True)
class Numbered(Sequence[str]):
    """The names "0" to "total - 1"."""

    total: int

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[str, ...]: ...
    def __getitem__(self, item: int | slice) -> str | tuple[str, ...]:
        if isinstance(item, slice):
            return tuple(map(str, range(self.total)[item]))
        return str(range(self.total)[item])

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self.total))

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        if not value.isdecimal() or str(int(value)) != value:
            raise ValueError(value)
        return range(self.total).index(int(value))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and value.isdecimal() and int(value) < self.total


@dataclass(frozen=True, eq=False)
class Ranges(Sequence[Rows]):
    """Each client's rows are those from `offsets[c]` to `offsets[c + 1]` of the columns."""

    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many rows each client has, [N]."""
        return np.diff(self.offsets)

    @overload
    def __getitem__(self, item: int) -> Rows: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[Rows, ...]: ...
    def __getitem__(self, item: int | slice) -> Rows | tuple[Rows, ...]:
        if isinstance(item, slice):
            return tuple(self[c] for c in range(len(self))[item])
        client = range(len(self))[item]
        # Python's integers: NumPy's own make this three times as slow.
        return np.arange(self.offsets.item(client), self.offsets.item(client + 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class GeneratedData(FederatedData):
    """A population whose clients' examples are made when they are used, and forgotten after.

    See `generated`, which makes it.
    """

    make: Make
    key: Key = field(default_factory=lambda: Key(0))
    members: NDArray[np.int64] | None = None

    def train(self, client: int) -> Examples:
        own = client if self.members is None else int(self.members[client])
        x, y = self.make(own, self.key.fold("client", own).generator())
        lengths = {len(column) for _, column in (*columns_of(x), ("", y))}
        if lengths != {self.size(client)} or shape_of(x) != self.shape:
            made = of_each(x, lambda column: list(column.shape))
            raise DataError(
                f"{self.name}: client {client} was promised {self.size(client)} inputs of shape "
                f"{shape_text(self.shape)}, but {made} and {len(y)} targets were made"
            )
        return Examples(_like(self.x, x), np.ascontiguousarray(y, self.y.dtype))

    def test(self, client: int) -> Examples:
        return Examples(self.x, self.y)

    def subset(self, clients: Sequence[int]) -> FederatedData:
        chosen = np.array(clients, np.int64)
        return replace(
            self,
            names=tuple(self.names[client] for client in clients),
            train_rows=Ranges(np.concatenate([[0], np.cumsum(self.sizes()[chosen])])),
            test_rows=Ranges(np.zeros(len(chosen) + 1, np.int64)),
            members=chosen if self.members is None else self.members[chosen],
        )

    def all_train(self) -> Examples:
        raise DataError(
            f"{self.name}: the examples of {len(self)} clients are made one client at a time; "
            "training on all of them together is not possible"
        )

    def label_distribution(self) -> NDArray[np.int64]:
        raise DataError(f"{self.name}: the labels of a generated population are not counted")

    def digest(self) -> str:
        first, last = (self.train(client) for client in (0, len(self) - 1))
        state = sha256(f"{self.key} {len(self)}".encode())
        state.update(np.ascontiguousarray(self.sizes()).data)
        for each in (first, last, self.test_part):
            x, y = each.all()
            for name, column in (*columns_of(x), ("", y)):
                state.update(name.encode())
                state.update(np.ascontiguousarray(column).data)
        return state.hexdigest()


def generated(
    make: Make,
    *,
    clients: int,
    examples: int | NDArray[np.int64],
    task: Task | str = "classification",
    classes: int | None = None,
    test: tuple[Any, NDArray[Any]] | None = None,
    seed: int = 0,
    name: str = "generated",
) -> FederatedData:
    """A population of any size whose data are a function of the client's number and its own key.

    Args:
        make: `make(client, rng) -> (x, y)`; the generator is the client's own and always the same.
        clients: how many there are.
        examples: how many each holds, or an array of that for each, [N].
        test: inputs and targets of the global test part, if there is one.
    """
    if clients < 1:
        raise DataError(f"{name}: there are no clients")
    sizes = np.broadcast_to(np.asarray(examples, np.int64), clients)
    x, y = make(0, Key(seed).fold("client", 0).generator())
    kind = task_of(task)
    if isinstance(as_inputs(x), dict):
        x = {each: named_input(np.asarray(column), "inputs") for each, column in x.items()}  # type: ignore[union-attr]
    else:
        x = np.asarray(x, kind.input_dtype)
    y = np.asarray(y, kind.target_dtype)
    if classes is None and kind.classed:
        raise DataError(f"{name}: say how many classes there are (classes=...)")
    nothing = (of_each(x, _none_of), _none_of(y))
    held_out = nothing if test is None else (as_inputs(test[0]), test[1])
    return GeneratedData(
        name, kind, classes, (), Numbered(clients), *nothing,
        Ranges(np.concatenate([[0], np.cumsum(sizes)])),
        Ranges(np.zeros(clients + 1, np.int64)),
        Examples(_like(x, held_out[0]), np.asarray(held_out[1], y.dtype)),
        make=make, key=Key(seed),
    )  # fmt: skip


def _none_of(column: NDArray[Any]) -> NDArray[Any]:
    return np.empty((0, *column.shape[1:]), column.dtype)


def _like(columns: Inputs, x: Any) -> Inputs:
    """Inputs in the types of these columns."""
    if isinstance(columns, dict):
        return {
            name: np.ascontiguousarray(x[name], column.dtype) for name, column in columns.items()
        }
    return np.ascontiguousarray(x, columns.dtype)


def from_columns(
    x: Inputs,
    y: NDArray[Any],
    offsets: NDArray[np.int64],
    *,
    task: Task | str = "classification",
    classes: int | None = None,
    names: Sequence[str] | None = None,
    test: tuple[Any, NDArray[Any]] | None = None,
    name: str = "columns",
) -> FederatedData:
    """A population over columns in which each client's rows lie together, memory-mapped or not.

    Nothing is copied or looked through: open large files with `np.load(path, mmap_mode="c")`.

    Args:
        x, y: inputs float32 (tokens int64; of several by name, each either) and targets (int64 for
            labels and tokens, float32 for others).
        offsets: client c holds rows offsets[c] to offsets[c + 1], [N + 1].
    """
    offsets = np.asarray(offsets, np.int64)
    clients = len(offsets) - 1
    if clients < 1 or offsets[0] != 0 or offsets[-1] > length(x) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"{name}: offsets must go from 0 up to at most {length(x)}, one more than clients"
        )
    x, kind = as_inputs(x), task_of(task)
    inputs: tuple[type[np.generic], ...] = (kind.input_dtype,)
    if isinstance(x, dict):
        inputs = (np.float32, np.int64)
    used: list[tuple[str, NDArray[Any], tuple[type[np.generic], ...]]]
    used = [(f"inputs {each}".strip(), column, inputs) for each, column in columns_of(x)]
    used.append(("targets", y, (kind.target_dtype,)))
    for noun, column, dtypes in used:
        if column.dtype not in dtypes:
            told = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
            raise DataError(
                f"{name}: {noun} are {column.dtype}; they must be {told}, because they "
                "are used as they lie"
            )
        if len(column) != length(x):
            raise DataError(f"{name}: {length(x)} inputs but {len(column)} {noun}")
    if classes is None and kind.classed:
        raise DataError(f"{name}: say how many classes there are (classes=...)")
    held_out = (picked(x, slice(0)), y[:0]) if test is None else (as_inputs(test[0]), test[1])
    return FederatedData(
        name, kind, classes, (), Numbered(clients) if names is None else tuple(names), x, y,
        Ranges(offsets), Ranges(np.zeros(clients + 1, np.int64)), Examples(*held_out),
    )  # fmt: skip
