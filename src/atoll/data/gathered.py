"""A population gathered from arrays that already belong to clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Inputs, shape_of, shape_text, stacked
from atoll.data.federated import FederatedData, assemble
from atoll.data.sources.arrays import from_arrays, pair
from atoll.data.tasks import Task
from atoll.errors import DataError

Pair = tuple[Inputs, NDArray[Any]]


def from_clients(
    clients: Mapping[Any, tuple[Any, ArrayLike] | Dataset],
    *,
    task: Task | str | None = None,
    classes: int | None = None,
    test: float = 0.2,
    test_part: tuple[Any, ArrayLike] | None = None,
    seed: int = 0,
    name: str = "clients",
) -> FederatedData:
    """A population from each client's own arrays or data set: `{"hospital-a": (x, y), ...}`.

    Arrays are as in `from_arrays`, the same shapes and kinds for everybody; text labels get the
    sorted texts of all clients as their names. `x` may be a dict of arrays by name. Data sets, as
    of `from_table(..., encoding=)`, must mean the same; they say their task and classes.

    Raises DataError, naming the client, for what does not fit.
    """
    if not isinstance(clients, Mapping):
        raise DataError(
            f"{name}: from_clients takes a dict of client names to pairs (x, y), not "
            f"{type(clients).__name__}"
        )
    if not clients:
        raise DataError(f"{name}: there are no clients")
    sets = {str(client): own for client, own in clients.items() if isinstance(own, Dataset)}
    like = None
    if sets:
        if len(sets) < len(clients):
            raise DataError(f"{name}: give every client's data as a data set, or none")
        if task is not None or classes is not None:
            raise DataError(f"{name}: data sets say their task and classes themselves")
        like = _alike(sets, name)
        task, classes = like.task, like.classes
        clients = {client: (own.x, own.y) for client, own in sets.items()}
    held = {
        str(client): _own(own, f"{name}, client {client!r}", task)
        for client, own in clients.items()
    }
    if len(held) < len(clients):
        raise DataError(f"{name}: two clients have the same name once it is text")
    first = next(iter(held))
    for client, own in held.items():
        _check_alike(own, held[first], f"{name}, client {client!r}", repr(first))
    dataset = from_arrays(
        stacked([x for x, _ in held.values()]),
        np.concatenate([y for _, y in held.values()]),
        task=task,
        classes=classes,
        test=test_part,
        name=name,
        class_names=like.class_names if like else (),
        columns=like.columns if like else (),
    )
    if like is not None and like.encoding is not None:
        dataset = dataset.encoded(like.encoding)
    ends = np.cumsum([len(y) for _, y in held.values()])
    return assemble(dataset, list(held), np.split(np.arange(len(dataset)), ends[:-1]), test, seed)


def _alike(sets: Mapping[str, Dataset], name: str) -> Dataset:
    """The first of these data sets, if all of them mean the same."""
    (first, like), *others = sets.items()
    for client, own in sets.items():
        if own.test is not None:
            raise DataError(
                f"{name}, client {client!r}: this set has a test part of its own; leave it out: "
                "test=0.2 says how much of each client's rows is held out"
            )
    for client, own in others:
        who = f"{name}, client {client!r}"
        if (own.task, own.classes) != (like.task, like.classes):
            raise DataError(
                f"{who}: the task is {own.task} of {own.classes}, but {like.task} of "
                f"{like.classes} of {first!r}"
            )
        how = own.meaning.difference(like.meaning, repr(client), repr(first))
        if how:
            raise DataError(f"{who}: the data mean something else than those of {first!r}: {how}")
        if own.encoding and like.encoding and own.encoding.digest != like.encoding.digest:
            told = own.encoding.difference(like.encoding, repr(client), repr(first))
            raise DataError(
                f"{who}: encoded in another way than {first!r}: {told}; give both encoding=..."
            )
    return like


def _own(own: Any, name: str, task: Task | str | None) -> Pair:
    """One client's pair of arrays."""
    if not isinstance(own, tuple | list) or len(own) != 2:
        raise DataError(
            f"{name}: give a pair of arrays (x, y) or a Dataset, not {type(own).__name__}; a torch "
            "dataset goes through from_torch"
        )
    return pair(own[0], own[1], name, task)


def _check_alike(own: Pair, other: Pair, name: str, whom: str) -> None:
    """Raise `DataError` unless both clients' arrays are of one shape and kind."""
    if isinstance(own[0], dict) != isinstance(other[0], dict) or (
        isinstance(own[0], dict) and set(own[0]) != set(other[0])
    ):
        told = [", ".join(x) if isinstance(x, dict) else "one array" for x in (own[0], other[0])]
        raise DataError(f"{name}: the inputs are {told[0]}, but {told[1]} of {whom}")
    if shape_of(own[0]) != shape_of(other[0]):
        raise DataError(
            f"{name}: inputs have shape {shape_text(shape_of(own[0]))}, but "
            f"{shape_text(shape_of(other[0]))} of {whom}"
        )
    if own[1].shape[1:] != other[1].shape[1:]:
        raise DataError(
            f"{name}: targets have shape {list(own[1].shape[1:])}, but "
            f"{list(other[1].shape[1:])} of {whom}"
        )
    kinds = ["text" if y.dtype.kind == "O" else "numbers" for y in (own[1], other[1])]
    if kinds[0] != kinds[1]:
        raise DataError(f"{name}: the labels are {kinds[0]}, but {kinds[1]} of {whom}")
