"""Tasks: what targets are, which losses fit them, and what a model's outputs are measured by.

Everything that depends on the kind of task asks one of these objects. Four are here; a class of
people's own that says the same makes another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.examples import Inputs
from atoll.data.sums import (
    CONFUSION_LIMIT,
    HISTOGRAM_LIMIT,
    SCORE_BINS,
    Sums,
    auc,
    classification_sums,
    f1,
    multilabel_sums,
    regression_sums,
    token_sums,
)
from atoll.errors import DataError

Array = NDArray[Any]

#: More classes than this, and more than there are examples, are not inferred but asked for.
INFERRED_CLASSES = 1000
#: Whole numbers up to this one are float32 as they are.
EXACT = 1 << 24


class Task(ABC):
    """A kind of task. Two of one class and name are the same.

    A task of people's own says `name`, `targets`, `metrics`, `sums` and `figures`; the rest has
    defaults. What it raises is a `DataError` with a sentence, before which the data's name is put.
    """

    #: What it is called where texts say it.
    name: str
    #: The metric that is shown first, and whose spread over clients is reported.
    main: str = "loss"
    #: Metrics of which more is better.
    higher: frozenset[str] = frozenset()
    #: The losses, by their names, that fit; the first is the usual one. Empty: nobody knows.
    losses: tuple[str, ...] = ()
    #: Whether data must say how many classes (or labels, or tokens) there are.
    classed: bool = False
    #: Whether a target is one label, so that clients can be told apart by what they hold of each.
    labelled: bool = False
    #: What `classes` counts, in texts.
    noun: str = "classes"
    #: What one array of inputs, and the targets, are made of.
    input_dtype: type[np.generic] = np.float32
    target_dtype: type[np.generic] = np.float32

    @abstractmethod
    def targets(self, y: Array, classes: int | None) -> Array:
        """The targets as learners take them; raises if they are out of range."""

    @abstractmethod
    def metrics(self, classes: int | None) -> tuple[str, ...]:
        """The names of what `figures` gives on data of so many classes."""

    @abstractmethod
    def sums(self, outputs: Array, targets: Array, loss_sum: float, classes: int | None) -> Sums:
        """What is counted of a batch of float32 outputs; `loss_sum` is its mean loss x `terms`."""

    @abstractmethod
    def figures(self, sums: Sums) -> dict[str, float]:
        """The metrics that people read, from sums; one that is not defined is NaN."""

    def inputs(self, x: Array, classes: int | None) -> Array:
        """One array of inputs as learners take it; raises if it cannot be used."""
        return real(x, "inputs")

    def check(self, x: Inputs, y: Array) -> None:
        """Raise unless inputs and targets have shapes that belong together."""

    def claims(self, y: Array) -> bool:
        """Whether targets like these mean this task where nobody has said which one."""
        return False

    def count(self, parts: Sequence[tuple[Inputs, Array]]) -> int | None:
        """How many classes there are, where nobody has said it."""
        return None

    def terms(self, targets: Array) -> int:
        """Over how many terms the mean loss of a batch is a mean."""
        return len(targets)

    def widths(self, loss: object, classes: int | None) -> frozenset[int] | None:
        """How many outputs per example a model may give; None where any number is right."""
        return None

    def decides(self, shape: Sequence[int]) -> bool:
        """Whether each number of an example's outputs, of this shape, is the logit of a yes."""
        return False

    def undefined(self, metric: str, targets: Array) -> str:
        """Why a metric has no value on these targets alone; empty if it has one."""
        return ""

    def sums_bytes(self, classes: int | None) -> int:
        """About how much the sums of one batch take."""
        return 1024

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and (type(self), self.name) == (type(other), other.name)

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<task {self.name}>"


class Classification(Task):
    """One label per example: y [N] int64 in [0, classes)."""

    name = "classification"
    main = "accuracy"
    higher = frozenset({"accuracy", "macro_f1", "auc"})
    losses = ("cross_entropy", "binary_cross_entropy")
    classed = labelled = True
    target_dtype = np.int64

    def targets(self, y: Array, classes: int | None) -> Array:
        return whole(y, classes, "label")

    def check(self, x: Inputs, y: Array) -> None:
        if y.ndim != 1:
            raise DataError(f"labels must have shape [N], not {y.shape}; flatten them")

    def claims(self, y: Array) -> bool:
        return y.dtype.kind == "O" or (y.dtype.kind in "iub" and y.ndim == 1)

    def count(self, parts: Sequence[tuple[Inputs, Array]]) -> int:
        return _counted([y for _, y in parts])

    def widths(self, loss: object, classes: int | None) -> frozenset[int]:
        if loss == "binary_cross_entropy":
            return frozenset({1} if classes == 2 else ())
        # A loss of people's own may take one logit for two classes.
        one = not isinstance(loss, str) and classes == 2
        return frozenset({classes or 0} | ({1} if one else set()))

    def decides(self, shape: Sequence[int]) -> bool:
        return math.prod(shape) == 1

    def metrics(self, classes: int | None) -> tuple[str, ...]:
        few = ("macro_f1",) if (classes or 0) <= CONFUSION_LIMIT else ()
        return ("loss", "accuracy", *few, *(("auc",) if classes == 2 else ()))

    def sums(self, outputs: Array, targets: Array, loss_sum: float, classes: int | None) -> Sums:
        return classification_sums(outputs, targets, loss_sum, classes or 0)

    def figures(self, sums: Sums) -> dict[str, float]:
        count = float(sums["count"])
        metrics = {"loss": float(sums["loss"]) / count}
        metrics["accuracy"] = float(sums["correct"]) / count
        if "confusion" in sums:
            confusion = sums["confusion"]
            metrics["macro_f1"] = f1(
                np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
            )
        if "scores" in sums:
            metrics["auc"] = auc(sums["scores"])
        return metrics

    def undefined(self, metric: str, targets: Array) -> str:
        if metric == "auc" and len(targets) and (targets == targets[0]).all():
            return f"has only class {targets[0]}"
        return ""

    def sums_bytes(self, classes: int | None) -> int:
        confusion = (classes or 0) ** 2 if (classes or 0) <= CONFUSION_LIMIT else 0
        return 8 * (confusion + (2 * SCORE_BINS if classes == 2 else 0)) + 1024


class Regression(Task):
    """Amounts: y [N] or [N, D] float32."""

    name = "regression"
    higher = frozenset({"r2"})
    losses = ("mse", "l1", "squared")

    def targets(self, y: Array, classes: int | None) -> Array:
        if y.dtype.kind not in "fiub":
            raise DataError(f"targets have dtype {y.dtype}; regression needs numbers")
        return _finite(y)

    def check(self, x: Inputs, y: Array) -> None:
        if y.dtype.kind == "O":
            raise DataError("the targets are text, which task='regression' cannot use")

    def claims(self, y: Array) -> bool:
        return y.dtype.kind == "f"

    def metrics(self, classes: int | None) -> tuple[str, ...]:
        return ("loss", "mae", "rmse", "r2")

    def sums(self, outputs: Array, targets: Array, loss_sum: float, classes: int | None) -> Sums:
        return regression_sums(outputs, targets, loss_sum)

    def figures(self, sums: Sums) -> dict[str, float]:
        count = float(sums["count"])
        spread = float(sums["target_squared"]) - float(sums["target"]) ** 2 / count
        return {
            "loss": float(sums["loss"]) / float(sums["examples"]),
            "mae": float(sums["absolute"]) / count,
            "rmse": math.sqrt(float(sums["squared"]) / count),
            "r2": 1 - float(sums["squared"]) / spread if spread > 0 else math.nan,
        }


class Tokens(Task):
    """The token that follows: x and y [N, T] int64 in [0, classes)."""

    name = "tokens"
    main = "accuracy"
    higher = frozenset({"accuracy"})
    losses = ("cross_entropy",)
    classed = True
    input_dtype = target_dtype = np.int64

    def targets(self, y: Array, classes: int | None) -> Array:
        return whole(y, classes, "label")

    def inputs(self, x: Array, classes: int | None) -> Array:
        return whole(x, classes, "token")

    def check(self, x: Inputs, y: Array) -> None:
        # Of several inputs nobody knows which are the tokens.
        if not isinstance(x, dict) and x.shape != y.shape:
            raise DataError(
                f"tokens need inputs and targets of one shape [N, T], not {x.shape} and {y.shape}"
            )

    def count(self, parts: Sequence[tuple[Inputs, Array]]) -> int:
        one = [x for x, _ in parts if not isinstance(x, dict)]
        return _counted([*(y for _, y in parts), *one])

    def terms(self, targets: Array) -> int:
        return targets.size

    def widths(self, loss: object, classes: int | None) -> frozenset[int]:
        return CLASSIFICATION.widths(loss, classes)

    def metrics(self, classes: int | None) -> tuple[str, ...]:
        return ("loss", "accuracy", "perplexity")

    def sums(self, outputs: Array, targets: Array, loss_sum: float, classes: int | None) -> Sums:
        return token_sums(outputs, targets, loss_sum)

    def figures(self, sums: Sums) -> dict[str, float]:
        count = float(sums["count"])
        loss = float(sums["loss"]) / count
        accuracy = float(sums["correct"]) / count
        return {"loss": loss, "accuracy": accuracy, "perplexity": math.exp(min(loss, 700.0))}


class MultiLabel(Task):
    """Any number of labels per example: y [N, K] of 0 and 1, float32; `classes` is K.

    A model gives one logit for each label. "accuracy" is the share of right answers over examples
    and labels, "exact" that of examples with every label right; "micro_f1" is of all answers
    together, "macro_f1" the mean over labels that occur or were predicted, "auc" the mean over
    labels that some examples have and others have not.
    """

    name = "multilabel"
    main = "accuracy"
    higher = frozenset({"accuracy", "exact", "micro_f1", "macro_f1", "auc"})
    losses = ("binary_cross_entropy",)
    classed = True
    noun = "labels"

    def targets(self, y: Array, classes: int | None) -> Array:
        self.check({}, y)
        if classes is not None and y.shape[1] != classes:
            raise DataError(f"there are {y.shape[1]} labels, but classes={classes}")
        if y.dtype.kind not in "fiub" or not ((y == 0) | (y == 1)).all():
            raise DataError("targets must be 0 or 1, for each label whether an example has it")
        return np.ascontiguousarray(y, dtype=np.float32)

    def check(self, x: Inputs, y: Array) -> None:
        if y.ndim != 2:
            raise DataError(
                f"targets must have shape [N, K], 0 or 1 for each of K labels, not {y.shape}"
            )

    def count(self, parts: Sequence[tuple[Inputs, Array]]) -> int:
        return int(parts[0][1].shape[1])

    def widths(self, loss: object, classes: int | None) -> frozenset[int]:
        return frozenset({classes or 0})

    def decides(self, shape: Sequence[int]) -> bool:
        return True

    def metrics(self, classes: int | None) -> tuple[str, ...]:
        few = ("auc",) if (classes or 0) <= HISTOGRAM_LIMIT else ()
        return ("loss", "accuracy", "exact", "micro_f1", "macro_f1", *few)

    def sums(self, outputs: Array, targets: Array, loss_sum: float, classes: int | None) -> Sums:
        return multilabel_sums(outputs, targets, loss_sum)

    def figures(self, sums: Sums) -> dict[str, float]:
        count, hits = float(sums["count"]), sums["hits"]
        support = 2 * hits + sums["alarms"] + sums["misses"]
        metrics = {
            "loss": float(sums["loss"]) / count,
            "accuracy": float((hits + sums["rests"]).mean()) / count,
            "exact": float(sums["exact"]) / count,
            "micro_f1": f1(hits.sum(keepdims=True), support.sum(keepdims=True)),
            "macro_f1": f1(hits, support),
        }
        if "scores" in sums:
            each = [auc(scores) for scores in sums["scores"]]
            known = [value for value in each if not math.isnan(value)]
            metrics["auc"] = sum(known) / len(known) if known else math.nan
        return metrics

    def undefined(self, metric: str, targets: Array) -> str:
        if metric == "auc" and (targets == targets[:1]).all():
            return "has no label that some examples have and others have not"
        return ""

    def sums_bytes(self, classes: int | None) -> int:
        few = (classes or 0) <= HISTOGRAM_LIMIT
        return 16 * SCORE_BINS * (classes or 0) * few + 1024


CLASSIFICATION, REGRESSION = Classification(), Regression()
TOKENS, MULTILABEL = Tokens(), MultiLabel()
TASKS: dict[str, Task] = {
    task.name: task for task in (CLASSIFICATION, REGRESSION, TOKENS, MULTILABEL)
}


def task_of(task: Task | str) -> Task:
    """The task of this name, or the given one."""
    found = TASKS.get(task) if isinstance(task, str) else task
    if not isinstance(found, Task):
        raise DataError(
            f"task must be one of {', '.join(TASKS)} or a data.Task of your own, not {task!r}"
        )
    return found


def may_be_labels(task: Task | str | None) -> bool:
    """Whether targets may be one label each, as far as the task has been said."""
    found = TASKS.get(task) if isinstance(task, str) else task
    return task is None or (isinstance(found, Task) and found.labelled)


def inferred(y: Array) -> Task:
    """The task that targets like these mean, as far as they tell it."""
    for task in TASKS.values():
        if task.claims(y):
            return task
    raise DataError(
        f"whole targets of shape {y.shape} may mean several tasks; say "
        "task='tokens', task='multilabel' or task='regression', or flatten labels to [N]"
    )


def real(x: Array, noun: str) -> Array:
    """Numbers as float32, none of them missing; a whole row is named where one is."""
    if x.dtype.kind not in "fiub":
        raise DataError(f"{noun} have dtype {x.dtype}; encode them as numbers first")
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2 and x.size:
        most = max(int(x.max()), -int(x.min()))
        if most > EXACT:
            raise DataError(
                f"{noun} hold whole numbers up to {most}, but float32 is exact up to {EXACT} only: "
                "different ids would become one. Give them as an input by name, "
                "x={'ids': ...}, which stays int64, number them from 0, or divide amounts"
            )
    tell_apart(x, noun)
    x = _writeable(np.ascontiguousarray(x, dtype=np.float32))
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"{bad.sum()} of {len(x)} {noun} hold NaN or infinity "
            f"(first at row {int(bad.argmax())}); fill or drop them first"
        )
    return x


def tell_apart(x: Array, noun: str) -> None:
    """Raise `DataError` if whole numbers that differ would be one in float32."""
    if x.dtype.kind not in "iuf" or x.dtype == np.float32 or x.dtype.itemsize < 4:
        return
    size = np.abs(x)
    far = x[(size > EXACT) & (size < 2.0**63)]  # greater ones are amounts; NaN is neither
    different = np.unique(far[np.floor(far) == far])
    if len(np.unique(different.astype(np.float32))) < len(different):
        raise DataError(
            f"{noun} hold different whole numbers up to {different[-1]:.0f}, but float32 is exact "
            f"up to {EXACT} only: some would become one. Leave ids out, or number them from 0; "
            "divide amounts"
        )


def whole(y: Array, classes: int | None, noun: str) -> Array:
    """Whole numbers in [0, classes) as int64."""
    if classes is None:
        raise DataError("say how many classes there are (classes=...)")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise DataError(f"the {noun}s hold NaN or infinity; fill or drop them first")
    if y.dtype.kind not in "iub" and not (y.dtype.kind == "f" and (y == np.floor(y)).all()):
        raise DataError(f"{noun}s must be whole numbers, not {y.dtype}")
    y = _writeable(np.ascontiguousarray(y, dtype=np.int64))
    if len(y) and (y.min() < 0 or y.max() >= classes):
        raise DataError(
            f"{noun}s go from {y.min()} to {y.max()}, "
            f"but {classes} classes allow only 0 to {classes - 1}"
        )
    return y


def named_input(x: Array, noun: str) -> Array:
    """One of several inputs: whole numbers stay whole (int64), as token ids must be."""
    return _writeable(np.ascontiguousarray(x, np.int64)) if x.dtype.kind in "iub" else real(x, noun)


def _finite(y: Array) -> Array:
    tell_apart(y, "the targets")
    y = _writeable(np.ascontiguousarray(y, dtype=np.float32))
    if not np.isfinite(y).all():
        raise DataError("the targets hold NaN or infinity; fill or drop them first")
    return y


def _counted(labels: Sequence[Array]) -> int:
    if all(array.dtype.kind == "b" for array in labels):
        return 2
    highest = max(float(array.max(initial=0)) for array in labels)
    examples = len(labels[0])
    # NaN is let through: Dataset says what is wrong with it.
    if highest >= max(examples, INFERRED_CLASSES) and labels[0].ndim == 1:
        raise DataError(
            f"labels go up to {highest:.0f} in {examples} examples; say "
            f"task='regression' if they are amounts, or classes=... if there are so many classes"
        )
    return int(highest) + 1 if np.isfinite(highest) else 1


def _writeable(array: Array) -> Array:
    """The array, copied if it is read-only, which frameworks warn about when they share it."""
    return array if array.flags.writeable else array.copy()
