"""A population gathered from arrays that already belong to clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples, Task
from atoll.data.federated import FederatedData, assemble
from atoll.errors import DataError


def from_clients(
    clients: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    *,
    task: Task = "classification",
    classes: int | None = None,
    test: float = 0.2,
    test_part: tuple[NDArray[Any], NDArray[Any]] | None = None,
    seed: int = 0,
    name: str = "clients",
) -> FederatedData:
    """A population from each client's own arrays: `{"hospital-a": (x, y), ...}`."""
    if not clients:
        raise DataError(f"{name}: there are no clients")
    empty = [client for client, (x, _) in clients.items() if not len(x)]
    if empty:
        raise DataError(f"{name}: client {empty[0]!r} has no examples; leave it out")
    x = np.concatenate([np.asarray(x) for x, _ in clients.values()])
    y = np.concatenate([np.asarray(y) for _, y in clients.values()])
    if classes is None and task != "regression":
        classes = int(y.max()) + 1
    held_out = None if test_part is None else Examples(*test_part)
    dataset = Dataset(name, x, y, task, classes, test=held_out)
    ends = np.cumsum([len(x) for x, _ in clients.values()])
    return assemble(dataset, list(clients), np.split(np.arange(len(x)), ends[:-1]), test, seed)
