"""Dataset: examples of one task before anybody owns them, and the ways to give them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.data import partition, shift
from atoll.data.examples import Examples, Rows, Task
from atoll.data.federated import FederatedData, assemble
from atoll.errors import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples of one task before anybody owns them; the methods give them to clients.

    `keys` are natural owners: `{"hospital": [N] names}`. `test` is the set's own held-out part,
    if it has one. `describe` is one sentence for people.
    """

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    task: Task
    classes: int | None = None
    keys: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    test: Examples | None = None
    class_names: tuple[str, ...] = ()
    describe: str = ""

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise DataError(f"{self.name}: there are no examples")
        object.__setattr__(self, "x", _clean_inputs(self.x, self.task, self.classes, self.name))
        object.__setattr__(self, "y", _clean_targets(self.y, self.task, self.classes, self.name))
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: {len(self.x)} inputs but {len(self.y)} targets")
        if self.task == "classification" and self.y.ndim != 1:
            raise DataError(
                f"{self.name}: labels must be one number per example, not {list(self.y.shape)}"
            )
        for key, owners in self.keys.items():
            if len(owners) != len(self.x):
                raise DataError(
                    f"{self.name}: key {key!r} has {len(owners)} values for {len(self.x)} examples"
                )
        if self.test is not None:
            x, y = self.test.all()
            x = _clean_inputs(x, self.task, self.classes, f"{self.name}, test part")
            y = _clean_targets(y, self.task, self.classes, f"{self.name}, test part")
            if x.shape[1:] != self.x.shape[1:]:
                raise DataError(
                    f"{self.name}: test inputs have shape {list(x.shape[1:])}, but training inputs "
                    f"{list(self.x.shape[1:])}"
                )
            object.__setattr__(self, "test", Examples(x, y))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    def take(self, rows: Rows) -> Dataset:
        """The same set with only these rows of its training part."""
        keys = {key: owners[rows] for key, owners in self.keys.items()}
        return replace(self, x=self.x[rows], y=self.y[rows], keys=keys)

    def iid(self, *, clients: int, test: float = 0.2, seed: int = 0) -> FederatedData:
        """Deal the examples out evenly and at random."""
        return self._deal(partition.iid(len(self), clients, self._rng("iid", seed)), test, seed)

    def dirichlet(
        self,
        *,
        clients: int,
        alpha: float,
        balanced: bool = False,
        minimum: int = 2,
        test: float = 0.2,
        seed: int = 0,
    ) -> FederatedData:
        """Label skew: smaller alpha, fewer classes per client; `balanced` gives equal sizes."""
        labels, rng = self._labels(), self._rng("dirichlet", seed)
        if balanced:
            rows = partition.balanced_dirichlet(labels, clients, alpha, rng)
        else:
            rows = partition.dirichlet(labels, clients, alpha, minimum, rng)
        return self._deal(rows, test, seed)

    def shards(
        self, *, clients: int, per_client: int = 2, test: float = 0.2, seed: int = 0
    ) -> FederatedData:
        """Label skew: about `per_client` classes for each client (McMahan's 2-class shards)."""
        rng = self._rng("shards", seed)
        return self._deal(partition.shards(self._labels(), clients, per_client, rng), test, seed)

    def lognormal(
        self,
        *,
        clients: int,
        sigma: float = 1.0,
        minimum: int = 2,
        test: float = 0.2,
        seed: int = 0,
    ) -> FederatedData:
        """Quantity skew: sizes proportional to LogNormal(0, sigma)."""
        rng = self._rng("lognormal", seed)
        weights = rng.lognormal(0, sigma, clients)
        return self._deal(partition.sized(len(self), weights, minimum, rng), test, seed)

    def power_law(
        self,
        *,
        clients: int,
        exponent: float = 1.0,
        minimum: int = 2,
        test: float = 0.2,
        seed: int = 0,
    ) -> FederatedData:
        """Quantity skew: the k-th largest client holds a share proportional to k ** -exponent."""
        rng = self._rng("power law", seed)
        weights = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
        return self._deal(partition.sized(len(self), weights, minimum, rng), test, seed)

    def feature_shift(
        self,
        *,
        clients: int,
        noise: float = 0.0,
        rotations: int = 1,
        test: float = 0.2,
        seed: int = 0,
    ) -> FederatedData:
        """IID labels, but every client sees through its own instrument.

        `noise` is the variance that the last client's features gain; `rotations` is how many
        directions of an image the clients take turns in (4: quarter turns).
        """
        if noise < 0 or rotations < 1:
            raise DataError("noise must not be negative and rotations must be at least 1")
        rng = self._rng("feature shift", seed)
        rows = partition.iid(len(self), clients, rng)
        x = shift.rotate(self.x, rows, rotations) if rotations > 1 else self.x
        x = shift.add_noise(x, rows, noise, rng) if noise > 0 else x
        return self._deal(rows, test, seed, x)

    def by(
        self, key: str | None = None, *, minimum: int = 1, test: float = 0.2, seed: int = 0
    ) -> FederatedData:
        """One client per natural owner (its first key if none is named), `minimum` rows or more."""
        if not self.keys:
            raise DataError(
                f"{self.name} has no natural clients; partition it, e.g. .dirichlet(...)"
            )
        key = next(iter(self.keys)) if key is None else key
        if key not in self.keys:
            raise DataError(f"{self.name} has no key {key!r}; it has {', '.join(self.keys)}")
        names, rows = partition.by_owner(self.keys[key])
        kept = [i for i, held in enumerate(rows) if len(held) >= minimum]
        if not kept:
            raise DataError(f"{self.name}: no {key} has {minimum} examples or more")
        return assemble(self, [names[i] for i in kept], [rows[i] for i in kept], test, seed)

    def _deal(
        self, rows: partition.Partition, test: float, seed: int, x: NDArray[Any] | None = None
    ) -> FederatedData:
        return assemble(self, [str(client) for client in range(len(rows))], rows, test, seed, x)

    def _rng(self, purpose: str, seed: int) -> np.random.Generator:
        return Key(seed).fold("partition", purpose).generator()

    def _labels(self) -> NDArray[np.int64]:
        if self.task != "classification":
            raise DataError(f"{self.name} is a {self.task} set: it has no labels to skew")
        return self.y


def _clean_inputs(x: NDArray[Any], task: Task, classes: int | None, name: str) -> NDArray[Any]:
    x = np.asarray(x)
    if task == "tokens":
        return _clean_labels(x, classes, name, "token")
    if x.dtype.kind not in "fiub":
        raise DataError(f"{name}: inputs have dtype {x.dtype}; encode them as numbers first")
    x = _writeable(np.ascontiguousarray(x, dtype=np.float32))
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"{name}: {bad.sum()} of {len(x)} inputs hold NaN or infinity "
            f"(first at row {int(bad.argmax())}); fill or drop them first"
        )
    return x


def _clean_targets(y: NDArray[Any], task: Task, classes: int | None, name: str) -> NDArray[Any]:
    y = np.asarray(y)
    if task == "regression":
        if y.dtype.kind not in "fiub":
            raise DataError(f"{name}: targets have dtype {y.dtype}; regression needs numbers")
        y = _writeable(np.ascontiguousarray(y, dtype=np.float32))
        if not np.isfinite(y).all():
            raise DataError(f"{name}: the targets hold NaN or infinity; fill or drop them first")
        return y
    return _clean_labels(y, classes, name, "label")


def _clean_labels(y: NDArray[Any], classes: int | None, name: str, noun: str) -> NDArray[Any]:
    if classes is None:
        raise DataError(f"{name}: say how many classes there are (classes=...)")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise DataError(f"{name}: the {noun}s hold NaN or infinity; fill or drop them first")
    if y.dtype.kind not in "iub" and not (y.dtype.kind == "f" and (y == np.floor(y)).all()):
        raise DataError(f"{name}: {noun}s must be whole numbers, not {y.dtype}")
    y = _writeable(np.ascontiguousarray(y, dtype=np.int64))
    if len(y) and (y.min() < 0 or y.max() >= classes):
        raise DataError(
            f"{name}: {noun}s go from {y.min()} to {y.max()}, "
            f"but {classes} classes allow only 0 to {classes - 1}"
        )
    return y


def _writeable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, copied if it is read-only, which frameworks warn about when they share it."""
    return array if array.flags.writeable else array.copy()
