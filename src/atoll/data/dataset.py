"""Dataset: examples of one task before anybody owns them, and the ways to give them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.numbers import at_least_zero, whole
from atoll.core.random import Key
from atoll.data import partition, shift
from atoll.data.encoding.encoding import Encoding
from atoll.data.examples import Examples, Inputs, Rows, Shape, length, picked, shape_of, shape_text
from atoll.data.federated import FederatedData, assemble
from atoll.data.meaning import Meaning
from atoll.data.tasks import Task, named_input, task_of
from atoll.errors import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples of one task before anybody owns them; the methods give them to clients.

    `keys` are natural owners: `{"hospital": [N] names}`. `test` is the set's own held-out part,
    if it has one. `describe` is one sentence for people. `x` may be a dict of arrays by name, and
    `task` the name of one.
    """

    name: str
    x: Inputs
    y: NDArray[Any]
    task: Task
    classes: int | None = None
    keys: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    test: Examples | None = None
    class_names: tuple[str, ...] = ()
    describe: str = ""
    #: What each input is, where the source says so.
    columns: tuple[str, ...] = ()
    #: How a table became these arrays, if it did.
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        with said_of(self.name):
            object.__setattr__(self, "task", task_of(self.task))
            if self.task.classed and self.classes is None:
                raise DataError("say how many classes there are (classes=...)")
        if len(self.y) == 0:
            raise DataError(f"{self.name}: there are no examples")
        x, y = _cleaned(self.x, self.y, self.task, self.classes, self.name)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)
        for key, owners in self.keys.items():
            if len(owners) != len(self):
                raise DataError(
                    f"{self.name}: key {key!r} has {len(owners)} values for {len(self)} examples"
                )
        if self.test is not None:
            x, y = self.test.all()
            x, y = _cleaned(x, y, self.task, self.classes, f"{self.name}, test part")
            if shape_of(x) != self.shape:
                raise DataError(
                    f"{self.name}: test inputs have shape {shape_text(shape_of(x))}, but training "
                    f"inputs {shape_text(self.shape)}"
                )
            object.__setattr__(self, "test", Examples(x, y))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def meaning(self) -> Meaning:
        """What inputs, classes and label stand for, where the source says so."""
        target = self.encoding.target if self.encoding else ""
        return Meaning.of(self.x, self.columns, self.class_names, target)

    @property
    def shape(self) -> Shape:
        """Shape of one input, or of each by name."""
        return shape_of(self.x)

    def encoded(self, encoding: Encoding) -> Dataset:
        """The same set, known to have been encoded so."""
        return replace(self, columns=encoding.names, encoding=encoding)

    def take(self, rows: Rows) -> Dataset:
        """The same set with only these rows of its training part."""
        keys = {key: owners[rows] for key, owners in self.keys.items()}
        return replace(self, x=picked(self.x, rows), y=self.y[rows], keys=keys)

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
        whole("clients", clients, 1, DataError)
        weights = rng.lognormal(0, at_least_zero("sigma", sigma, DataError), clients)
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
        whole("clients", clients, 1, DataError)
        at_least_zero("exponent", exponent, DataError)
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
        at_least_zero("noise", noise, DataError)
        whole("rotations", rotations, 1, DataError)
        if isinstance(self.x, dict):
            raise DataError(
                f"{self.name} has inputs by name ({', '.join(self.x)}); feature_shift changes one "
                "array of inputs: shift them yourself and use data.from_clients"
            )
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
        whole("minimum", minimum, 0, DataError)
        names, rows = partition.by_owner(self.keys[key])
        kept = [i for i, held in enumerate(rows) if len(held) >= minimum]
        if not kept:
            raise DataError(f"{self.name}: no {key} has {minimum} examples or more")
        return assemble(self, [names[i] for i in kept], [rows[i] for i in kept], test, seed)

    def _deal(
        self, rows: partition.Partition, test: float, seed: int, x: Inputs | None = None
    ) -> FederatedData:
        return assemble(self, [str(client) for client in range(len(rows))], rows, test, seed, x)

    def _rng(self, purpose: str, seed: int) -> np.random.Generator:
        return Key(whole("seed", seed, 0, DataError)).fold("partition", purpose).generator()

    def _labels(self) -> NDArray[np.int64]:
        if not self.task.labelled:
            raise DataError(f"{self.name} is a {self.task} set: it has no labels to skew")
        return self.y


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Put the data's name before what is said of them."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _cleaned(
    x: Any, y: Any, task: Task, classes: int | None, name: str
) -> tuple[Inputs, NDArray[Any]]:
    """Inputs and targets as learners take them."""
    with said_of(name):
        x = _named(x) if isinstance(x, Mapping) else task.inputs(np.asarray(x), classes)
        y = np.asarray(y)
        if y.dtype.kind == "O":
            task.check(x, y)
        y = task.targets(y, classes)
        y = y if y.flags.writeable else y.copy()
        if length(x) != len(y):
            raise DataError(f"{length(x)} inputs but {len(y)} targets")
        task.check(x, y)
    return x, y


def _named(x: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    if not x or not all(isinstance(name, str) and name for name in x):
        raise DataError("inputs by name are a dict of text to arrays, with at least one of them")
    found = {
        name: named_input(np.asarray(column), f"inputs {name!r}") for name, column in x.items()
    }
    lengths = {name: len(column) for name, column in found.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(f"inputs have different numbers of examples: {told}")
    return found
