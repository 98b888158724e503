"""FederatedData: who holds what. Columns are held once; clients are sets of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.numbers import below_one, whole
from atoll.core.random import Key
from atoll.data.encoding.encoding import Encoding
from atoll.data.examples import (
    Examples,
    Inputs,
    Rows,
    Shape,
    columns_of,
    of_each,
    shape_of,
    shape_text,
)
from atoll.data.meaning import Meaning
from atoll.data.tasks import TASKS, Task, task_of
from atoll.errors import DataError
from atoll.view import html as display

if TYPE_CHECKING:
    from atoll.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class FederatedData:
    """The data of a population: for each client a train and a test part, and a global test part.

    Clients are numbered 0 to len - 1 and named by `names`. `test_part` is the set's own held-out
    part where it has one, and all clients' test parts together otherwise. `x` is a dict of columns
    where inputs have names; `task` may be given by its name.
    """

    name: str
    task: Task
    classes: int | None
    class_names: tuple[str, ...]
    names: Sequence[str]
    x: Inputs
    y: NDArray[Any]
    train_rows: Sequence[Rows]
    test_rows: Sequence[Rows]
    test_part: Examples
    #: What each input is, where the source says so.
    columns: tuple[str, ...] = ()
    #: How tables became these arrays, if they did.
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", task_of(self.task))
        if not self.names:
            raise DataError(f"{self.name}: there are no clients")
        if isinstance(self.names, tuple) and len(set(self.names)) != len(self.names):
            raise DataError(f"{self.name}: two clients have the same name")
        empty = np.flatnonzero(self.sizes() == 0)
        if len(empty):
            raise DataError(
                f"{self.name}: client {self.names[int(empty[0])]!r} has no training examples"
                + (f" (nor have {len(empty) - 1} others)" if len(empty) > 1 else "")
                + "; drop it, or partition with a larger minimum"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def meaning(self) -> Meaning:
        """What inputs, classes and label stand for, where the source says so."""
        target = self.encoding.target if self.encoding else ""
        return Meaning.of(self.x, self.columns, self.class_names, target)

    @property
    def shape(self) -> Shape:
        """Shape of one input, or of each by name."""
        return shape_of(self.x)

    def train(self, client: int) -> Examples:
        """The training part of one client."""
        return Examples(self.x, self.y, self.train_rows[client])

    def test(self, client: int) -> Examples:
        """The test part of one client; it may be empty."""
        return Examples(self.x, self.y, self.test_rows[client])

    def size(self, client: int) -> int:
        """How many training examples one client holds."""
        return int(self._sizes[client])

    def all_train(self) -> Examples:
        """Every client's training part together, as nobody in a federation can see it."""
        return Examples(self.x, self.y, np.concatenate(self.train_rows))

    def index(self, name: str) -> int:
        """The number of the client with this name."""
        try:
            return self.names.index(name)
        except ValueError:
            raise DataError(f"{self.name} has no client {name!r}") from None

    def subset(self, clients: Sequence[int]) -> FederatedData:
        """The same data with only these clients; the global test part stays."""
        return replace(
            self,
            names=tuple(self.names[client] for client in clients),
            train_rows=tuple(self.train_rows[client] for client in clients),
            test_rows=tuple(self.test_rows[client] for client in clients),
        )

    def sizes(self) -> NDArray[np.int64]:
        """Training examples of each client, [N]."""
        return self._sizes

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return _lengths(self.train_rows)

    def tested(self) -> NDArray[np.int64]:
        """The clients that have a test part."""
        return np.flatnonzero(_lengths(self.test_rows))

    @property
    def labelled(self) -> bool:
        """Whether every example has one label."""
        return self.task.labelled

    def label_distribution(self) -> NDArray[np.int64]:
        """Training examples of each client and class, [N, classes]."""
        if not self.labelled or self.classes is None:
            raise DataError(f"{self.name} is a {self.task} set: it has no label distribution")
        return np.stack(
            [np.bincount(self.y[rows], minlength=self.classes) for rows in self.train_rows]
        )

    def digest(self) -> str:
        """SHA-256 (hex) of names, rows and contents: equal for equal populations."""
        state = sha256()
        for name, train, test in zip(self.names, self.train_rows, self.test_rows, strict=True):
            state.update(f"{len(name)} {name} {len(train)} {len(test)} ".encode())
            state.update(np.ascontiguousarray(train).data)
            state.update(np.ascontiguousarray(test).data)
        x, y = self.test_part.all()
        named = [*columns_of(self.x), ("", self.y), *columns_of(x), ("", y)]
        for name, column in named:
            state.update(f"{name}{column.dtype} {column.shape} ".encode())
            state.update(np.ascontiguousarray(column).data)
        return state.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The figures of this population, ready for JSON."""
        sizes = self.sizes()
        return {
            "name": self.name,
            "task": self.task.name,
            "classes": self.classes,
            **self._told(),
            "input_shape": of_each(self.x, lambda column: list(column.shape[1:])),
            "clients": len(self),
            "train_examples": int(sizes.sum()),
            "test_examples": len(self.test_part),
            "smallest_client": int(sizes.min()),
            "median_client": float(np.median(sizes)),
            "largest_client": int(sizes.max()),
        }

    def _told(self) -> dict[str, Any]:
        """Of a task of people's own, its metrics, and of which of them more is better."""
        if TASKS.get(self.task.name) == self.task:
            return {}
        names = self.task.metrics(self.classes)
        return {"metrics": {name: name in self.task.higher for name in names}}

    def __str__(self) -> str:
        s = self.summary()
        kind = f"{s['task']}, {s['classes']} {self.task.noun}" if s["classes"] else s["task"]
        lines = [
            f"{self.name}: {kind}, inputs {shape_text(self.shape)}",
            f"{s['clients']} clients hold {s['train_examples']} training examples "
            f"({s['smallest_client']} to {s['largest_client']}, median {s['median_client']:g}); "
            f"{s['test_examples']} test examples",
        ]
        if self.labelled and len(self) <= 20 and len(self.y):
            counts = self.label_distribution()
            width = max(len(name) for name in self.names)
            lines += [
                f"  {name:<{width}}  " + " ".join(f"{count:5d}" for count in row)
                for name, row in zip(self.names, counts, strict=True)
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What notebooks show: the figures, and a bar for each client, by label where there are."""
        first, *others = str(self).splitlines()[:2]
        shown = min(len(self), 200)
        labelled = self.labelled and len(self) <= 2000 and len(self.y)
        stacks = (
            self.label_distribution()[:shown].tolist()
            if labelled
            else [[float(size)] for size in self.sizes()[:shown]]
        )
        caption = f"training examples of {'the first ' * (shown < len(self))}{shown} clients"
        parts = [*map(display.line, others), display.bars(stacks, caption), display.line(caption)]
        return display.block(first, *parts)

    def plot(self, path: str | Path) -> Path:
        """Draw who holds which labels (or how much, without labels) into an image file."""
        from atoll.view.population import draw_population

        return draw_population(self, Path(path))


def _lengths(rows: Sequence[Rows]) -> NDArray[np.int64]:
    known = getattr(rows, "lengths", None)
    return np.array([len(each) for each in rows], np.int64) if known is None else known


def assemble(
    dataset: Dataset,
    names: Sequence[str],
    partition: Sequence[Rows],
    test: float,
    seed: int,
    x: Inputs | None = None,
) -> FederatedData:
    """Hold out the fraction `test` of each client's rows and put the population together.

    A client always keeps at least one training example; a client of few rows may hold out none.
    """
    below_one("the test fraction", test, DataError)
    whole("seed", seed, 0, DataError)
    train_rows, test_rows = [], []
    for name, rows in zip(names, partition, strict=True):
        shuffled = Key(seed).fold("hold out", name).generator().permutation(rows)
        held_out = min(round(len(rows) * test), max(len(rows) - 1, 0))
        test_rows.append(np.sort(shuffled[:held_out]))
        train_rows.append(np.sort(shuffled[held_out:]))
    columns = dataset.x if x is None else x
    return FederatedData(
        dataset.name,
        dataset.task,
        dataset.classes,
        dataset.class_names,
        tuple(names),
        columns,
        dataset.y,
        tuple(train_rows),
        tuple(test_rows),
        dataset.test or Examples(columns, dataset.y, np.concatenate(test_rows)),
        dataset.columns,
        dataset.encoding,
    )


def one_client(dataset: Dataset, held_out: float) -> FederatedData:
    """A data set as one client's, of which the fraction `held_out` is for testing."""
    return assemble(dataset, ["site"], [np.arange(len(dataset))], held_out, 0)


def check_population(data: object) -> FederatedData:
    """The data as a population, or a sentence about what they are instead."""
    if isinstance(data, FederatedData):
        return data
    raise DataError(
        f"clients must be FederatedData, not {type(data).__name__}; partition a set first, "
        "e.g. data.load('digits').dirichlet(clients=100, alpha=0.3)"
    )
