"""Arrays that are already in memory: the source that every other source ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atoll.data.dataset import Dataset, said_of
from atoll.data.examples import Examples, Inputs, columns_of, shape_of
from atoll.data.tasks import Task, inferred, may_be_labels, task_of
from atoll.errors import DataError, shown

Array = NDArray[Any]


def from_arrays(
    x: ArrayLike | Mapping[str, ArrayLike],
    y: ArrayLike,
    *,
    task: Task | str | None = None,
    classes: int | None = None,
    keys: Mapping[str, ArrayLike] | None = None,
    test: tuple[Any, ArrayLike] | Examples | None = None,
    name: str = "arrays",
    class_names: Sequence[str] = (),
    describe: str = "",
    columns: Sequence[str] = (),
) -> Dataset:
    """A data set of inputs `x` [N, ...] and targets `y` [N] or [N, ...].

    Whatever `np.asarray` takes will do. Without `task`, whole or boolean `y` [N] mean
    classification with max + 1 classes, as do labels [N, 1]; text labels mean classification with
    the sorted texts
    of the training part as `class_names`, and fractional numbers mean regression; the task of
    predicting tokens must be said, and "multilabel". `keys` {"hospital": [N]} are natural owners
    and `test` is a held-out pair (x, y). The result has float32 inputs (int64 for tokens), int64
    labels or float32 targets; an array of that type already is shared, not copied. Inputs may be
    several by name, {"image": [N, ...], "age": [N, 1]}, of which whole numbers stay int64.
    `columns` name the inputs, in order: sites whose names differ are not averaged.

    Raises DataError for shapes that do not fit, missing values and labels out of range.
    """
    train = pair(x, y, name, task)
    held_out = None if test is None else _test_pair(test, train, f"{name}, test part", task)
    with said_of(name):
        kind = inferred(train[1]) if task is None else task_of(task)
        kind.check(*train)
        if classes is not None and not kind.classed:
            raise DataError(
                f"classes={classes} does not go with {kind}; "
                "if the targets are labels, say task='classification'"
            )
    class_names = tuple(class_names)
    if train[1].dtype.kind == "O":
        class_names = class_names or tuple(sorted(set(train[1].tolist())))
        train = train[0], _codes(train[1], class_names, name)
        if held_out is not None:
            held_out = held_out[0], _codes(held_out[1], class_names, f"{name}, test part")
    if kind.classed:
        with said_of(name):
            classes = _checked_classes(classes, class_names, train, held_out, kind)
    # A float64 beyond float32 becomes infinite, which Dataset refuses with a sentence.
    with np.errstate(over="ignore"):
        return Dataset(
            name=name,
            x=train[0],
            y=train[1],
            task=kind,
            classes=classes,
            keys={key: _owners(owners, key, name) for key, owners in (keys or {}).items()},
            test=None if held_out is None else Examples(*held_out),
            class_names=class_names,
            describe=describe,
            columns=tuple(columns),
        )


def channels_first(pixels: Array) -> NDArray[np.float32]:
    """Pictures [N, H, W] or [N, H, W, C] as float32 [N, C, H, W]; bytes are scaled to [0, 1].

    This is the convention of torchvision's `to_tensor`.
    """
    if pixels.ndim == 3:
        pixels = pixels[..., np.newaxis]
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 1), dtype=np.float32)
    if pixels.dtype == np.uint8:
        planes /= np.float32(255)
    return planes


def is_missing(value: object) -> bool:
    """Whether a Python value stands for no value: None, NaN, or pandas' NA and NaT."""
    if value is None or type(value).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def pair(x: Any, y: ArrayLike, name: str, task: Task | str | None = None) -> tuple[Inputs, Array]:
    """Inputs and targets of the same examples as arrays: one validation for every source.

    Targets are numbers, or text as objects; labels are [N].
    """
    inputs: Inputs
    if isinstance(x, Mapping):
        inputs = {str(key): _array(each, f"inputs {key!r}", name) for key, each in x.items()}
    else:
        inputs = _array(x, "inputs", name)
    targets = _plain_targets(_labels(_array(y, "targets", name), task, name), name)
    for key, column in columns_of(inputs):
        if len(column) != len(targets):
            noun = f"inputs {key!r}" if key else "inputs"
            raise DataError(f"{name}: {len(column)} {noun} but {len(targets)} targets")
    if len(targets) == 0:
        raise DataError(f"{name}: there are no examples")
    if not isinstance(inputs, dict) and inputs.ndim == 1:
        raise DataError(
            f"{name}: the inputs have shape {inputs.shape}, one number per example; "
            "give them a second dimension, as in x.reshape(-1, 1)"
        )
    return inputs, targets


def _array(values: ArrayLike, noun: str, name: str) -> Array:
    if hasattr(values, "toarray") and hasattr(values, "nnz"):
        raise DataError(f"{name}: the {noun} are a sparse matrix; make it dense with .toarray()")
    try:
        array = np.asarray(values)
        if array.dtype.kind in "SU" and isinstance(values, list | tuple):
            # NumPy would have made text of the numbers and missing values among them.
            array = np.asarray(values, dtype=object)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{name}: the {noun} do not become one array: {error}") from error
    if array.ndim == 0:
        raise DataError(
            f"{name}: the {noun} are {type(values).__name__!r}, not an array of examples"
        )
    # Arrow's and others' arrays may be read-only, about which PyTorch warns at every batch.
    return array if array.flags.writeable else array.copy()


def _labels(y: Array, task: Task | str | None, name: str) -> Array:
    """Targets whose shape says that they are labels, as [N]: columns and their like are flattened.

    Labels one-hot are refused; they may mean several labels each.
    """
    if y.ndim < 2 or not may_be_labels(task):
        return y
    if y.size == len(y) and (y.dtype.kind in "iubOSUT" or task is not None):
        return y.reshape(len(y))
    if y.ndim == 2 and y.dtype.kind in "iubf" and _one_hot(y):
        raise DataError(
            f"{name}: the labels are one-hot, [N, {y.shape[1]}]; give y.argmax(1), or say "
            "task='multilabel' if an example may have several"
        )
    return y


def _one_hot(y: Array) -> bool:
    return bool(len(y) and ((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all())


def _test_pair(
    test: tuple[Any, ArrayLike] | Examples,
    train: tuple[Inputs, Array],
    name: str,
    task: Task | str | None,
) -> tuple[Inputs, Array]:
    if isinstance(test, Examples):
        test = test.all()
    if not isinstance(test, tuple | list) or len(test) != 2:
        raise DataError(f"{name}: give the test part as a pair (x, y)")
    held_out = pair(test[0], test[1], name, task)
    for noun, own, trained in zip(("inputs", "targets"), held_out, train, strict=True):
        if shape_of(own) != shape_of(trained):
            raise DataError(
                f"{name}: {noun} have shape {shape_of(own)} each, "
                f"but {shape_of(trained)} in the training part"
            )
    if (held_out[1].dtype.kind == "O") != (train[1].dtype.kind == "O"):
        raise DataError(f"{name}: labels are text in one part and numbers in the other")
    return held_out


def _plain_targets(y: Array, name: str) -> Array:
    """Targets as numbers, or as an object array [N] of `str`; nothing missing, nothing else."""
    if y.dtype.kind in "OST":
        y = _plain_objects(y.astype(object), name)
    elif y.dtype.kind == "U":
        y = y.astype(object)
    if y.dtype.kind not in "fiubO":
        raise DataError(
            f"{name}: targets have dtype {y.dtype}; give numbers, or text for classes with names"
        )
    if y.dtype.kind == "O" and y.ndim != 1:
        raise DataError(f"{name}: text labels must have shape [N], not {y.shape}")
    return y


def _plain_objects(y: Array, name: str) -> Array:
    values = y.ravel().tolist()
    lacking = sum(map(is_missing, values))
    if lacking:
        raise DataError(
            f"{name}: {lacking} of {len(values)} targets are missing; drop these examples first"
        )
    if all(isinstance(value, str) for value in values):
        return y
    if all(isinstance(value, bytes) for value in values):
        texts = np.array([value.decode(errors="replace") for value in values], dtype=object)
        return texts.reshape(y.shape)
    if any(isinstance(value, str | bytes) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise DataError(f"{name}: the targets mix {' and '.join(kinds)}; make them all one kind")
    numbers = np.asarray(values)
    if numbers.dtype.kind not in "fiub":
        kind = type(values[0]).__name__
        raise DataError(f"{name}: the targets are {kind} objects; turn them into numbers or text")
    return numbers.reshape(y.shape)


def _checked_classes(
    classes: int | None,
    class_names: tuple[str, ...],
    train: tuple[Inputs, Array],
    held_out: tuple[Inputs, Array] | None,
    task: Task,
) -> int | None:
    if class_names:
        if len(set(class_names)) < len(class_names):
            raise DataError("a class name is given twice; every class needs its own")
        if classes not in (None, len(class_names)):
            raise DataError(
                f"there are {len(class_names)} class names but classes={classes}; "
                "give a name to every class with class_names=..."
            )
        return len(class_names)
    if classes is not None:
        return classes
    return task.count([train] if held_out is None else [train, held_out])


def _codes(y: Array, class_names: tuple[str, ...], name: str) -> NDArray[np.int64]:
    """Positions [N] of text labels among the class names."""
    code = {text: position for position, text in enumerate(class_names)}
    labels = y.tolist()
    unknown = sorted(set(labels) - code.keys())
    if unknown:
        raise DataError(
            f"{name}: {_listed(unknown)} not among the {len(class_names)} class names; "
            "give all of them with class_names=..., or drop these examples"
        )
    return np.fromiter((code[label] for label in labels), dtype=np.int64, count=len(labels))


def _listed(texts: Sequence[str]) -> str:
    return f"label {shown(texts)} is" if len(texts) == 1 else f"labels {shown(texts)} are"


def _owners(owners: ArrayLike, key: str, name: str) -> Array:
    array = _array(owners, f"owners of key {key!r}", name)
    if array.ndim != 1:
        raise DataError(f"{name}: key {key!r} must have shape [N], not {array.shape}")
    lacking = _without_value(array)
    if lacking.any():
        raise DataError(
            f"{name}: {lacking.sum()} of {len(array)} owners of key {key!r} are missing (first at "
            f"row {int(lacking.argmax())}); every row needs an owner: name it or drop the row"
        )
    return array


def _without_value(array: Array) -> NDArray[np.bool_]:
    """Which values [N] of any kind stand for no value."""
    if array.dtype.kind in "fMm":
        return np.asarray(np.isnan(array) if array.dtype.kind == "f" else np.isnat(array))
    if array.dtype.kind != "O":
        return np.zeros(len(array), np.bool_)
    return np.fromiter(map(is_missing, array.tolist()), np.bool_, len(array))
