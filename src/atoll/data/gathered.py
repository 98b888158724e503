"""A population gathered from arrays that already belong to clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples, as_inputs, length, stacked
from atoll.data.federated import FederatedData, assemble
from atoll.data.tasks import Task, task_of
from atoll.errors import DataError


def from_clients(
    clients: Mapping[str, tuple[Any, NDArray[Any]]],
    *,
    task: Task | str = "classification",
    classes: int | None = None,
    test: float = 0.2,
    test_part: tuple[Any, NDArray[Any]] | None = None,
    seed: int = 0,
    name: str = "clients",
) -> FederatedData:
    """A population from each client's own arrays: `{"hospital-a": (x, y), ...}`.

    `x` may be a dict of arrays by name, the same names for everybody.
    """
    if not clients:
        raise DataError(f"{name}: there are no clients")
    empty = [client for client, (x, _) in clients.items() if not length(as_inputs(x))]
    if empty:
        raise DataError(f"{name}: client {empty[0]!r} has no examples; leave it out")
    kind, inputs = task_of(task), {client: as_inputs(x) for client, (x, _) in clients.items()}
    names = {client: list(x) if isinstance(x, dict) else [] for client, x in inputs.items()}
    first = next(iter(names))
    for client, own in names.items():
        if set(own) != set(names[first]):
            raise DataError(
                f"{name}: inputs of client {client!r} are {own}, but {names[first]} of {first!r}"
            )
    x = stacked(list(inputs.values()))
    y = np.concatenate([np.asarray(y) for _, y in clients.values()])
    if classes is None:
        classes = kind.count([(x, y)])
    held_out = None if test_part is None else Examples(*test_part)
    dataset = Dataset(name, x, y, kind, classes, test=held_out)
    ends = np.cumsum([len(own) for _, own in clients.values()])
    return assemble(dataset, list(clients), np.split(np.arange(len(y)), ends[:-1]), test, seed)
