"""Arrays that are already in memory: the source that every other source ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Examples, Task
from atoll.errors import DataError

Array = NDArray[Any]

#: More classes than this, and more than there are examples, are not inferred but asked for.
_INFERRED_CLASSES = 1000


def from_arrays(
    x: ArrayLike,
    y: ArrayLike,
    *,
    task: Task | None = None,
    classes: int | None = None,
    keys: Mapping[str, ArrayLike] | None = None,
    test: tuple[ArrayLike, ArrayLike] | Examples | None = None,
    name: str = "arrays",
    class_names: Sequence[str] = (),
    describe: str = "",
) -> Dataset:
    """A data set of inputs `x` [N, ...] and targets `y` [N] or [N, ...].

    Whatever `np.asarray` takes will do. Without `task`, whole or boolean `y` [N] mean
    classification with max + 1 classes, text labels mean classification with the sorted texts
    of the training part as `class_names`, and fractional numbers mean regression; the task of
    predicting tokens must be said. `keys` {"hospital": [N]} are natural owners and `test` is a
    held-out pair (x, y). The result has float32 inputs (int64 for tokens), int64 labels or
    float32 targets; an array of that type already is shared, not copied.

    Raises DataError for shapes that do not fit, missing values and labels out of range.
    """
    train = _pair(x, y, name)
    held_out = None if test is None else _test_pair(test, train, f"{name}, test part")
    task = _checked_task(task, name) or _inferred_task(train[1], name)
    _check_task(task, *train, classes, name)
    class_names = tuple(class_names)
    if train[1].dtype.kind == "O":
        class_names = class_names or tuple(sorted(set(train[1].tolist())))
        train = train[0], _codes(train[1], class_names, name)
        if held_out is not None:
            held_out = held_out[0], _codes(held_out[1], class_names, f"{name}, test part")
    if task != "regression":
        classes = _checked_classes(classes, class_names, train, held_out, task, name)
    # A float64 beyond float32 becomes infinite, which Dataset refuses with a sentence.
    with np.errstate(over="ignore"):
        return Dataset(
            name=name,
            x=train[0],
            y=train[1],
            task=task,
            classes=classes,
            keys={key: _owners(owners, key, name) for key, owners in (keys or {}).items()},
            test=None if held_out is None else Examples(*held_out),
            class_names=class_names,
            describe=describe,
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


def _pair(x: ArrayLike, y: ArrayLike, name: str) -> tuple[Array, Array]:
    inputs = _array(x, "inputs", name)
    targets = _plain_targets(_array(y, "targets", name), name)
    if len(inputs) != len(targets):
        raise DataError(f"{name}: {len(inputs)} inputs but {len(targets)} targets")
    if len(inputs) == 0:
        raise DataError(f"{name}: there are no examples")
    if inputs.ndim == 1:
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


def _test_pair(
    test: tuple[ArrayLike, ArrayLike] | Examples, train: tuple[Array, Array], name: str
) -> tuple[Array, Array]:
    if isinstance(test, Examples):
        test = test.all()
    if not isinstance(test, tuple | list) or len(test) != 2:
        raise DataError(f"{name}: give the test part as a pair (x, y)")
    held_out = _pair(test[0], test[1], name)
    for noun, own, trained in zip(("inputs", "targets"), held_out, train, strict=True):
        if own.shape[1:] != trained.shape[1:]:
            raise DataError(
                f"{name}: {noun} have shape {own.shape[1:]} each, "
                f"but {trained.shape[1:]} in the training part"
            )
        if noun == "targets" and (own.dtype.kind == "O") != (trained.dtype.kind == "O"):
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


def _checked_task(task: Task | None, name: str) -> Task | None:
    if task is not None and task not in get_args(Task):
        raise DataError(f"{name}: task must be one of {', '.join(get_args(Task))}, not {task!r}")
    return task


def _inferred_task(y: Array, name: str) -> Task:
    if y.dtype.kind == "O" or (y.dtype.kind in "iub" and y.ndim == 1):
        return "classification"
    if y.dtype.kind == "f":
        return "regression"
    raise DataError(
        f"{name}: whole targets of shape {y.shape} may mean several tasks; say "
        "task='tokens' or task='regression', or flatten labels to [N]"
    )


def _check_task(task: Task, x: Array, y: Array, classes: int | None, name: str) -> None:
    if task == "classification" and y.ndim != 1:
        raise DataError(f"{name}: labels must have shape [N], not {y.shape}; flatten them")
    if task == "regression" and y.dtype.kind == "O":
        raise DataError(f"{name}: the targets are text, which task='regression' cannot use")
    if task == "regression" and classes is not None:
        raise DataError(
            f"{name}: classes={classes} does not go with regression; "
            "if the targets are labels, say task='classification'"
        )
    if task == "tokens" and x.shape != y.shape:
        raise DataError(
            f"{name}: tokens need inputs and targets of one shape [N, T], "
            f"not {x.shape} and {y.shape}"
        )


def _checked_classes(
    classes: int | None,
    class_names: tuple[str, ...],
    train: tuple[Array, Array],
    held_out: tuple[Array, Array] | None,
    task: Task,
    name: str,
) -> int:
    if class_names:
        if len(set(class_names)) < len(class_names):
            raise DataError(f"{name}: a class name is given twice; every class needs its own")
        if classes not in (None, len(class_names)):
            raise DataError(
                f"{name}: there are {len(class_names)} class names but classes={classes}; "
                "give a name to every class with class_names=..."
            )
        return len(class_names)
    if classes is not None:
        return classes
    parts = train if held_out is None else train + held_out
    return _inferred_classes(parts if task == "tokens" else parts[1::2], name)


def _inferred_classes(labels: Sequence[Array], name: str) -> int:
    if all(array.dtype.kind == "b" for array in labels):
        return 2
    highest = max(float(array.max(initial=0)) for array in labels)
    examples = len(labels[0])
    # NaN is let through: Dataset says what is wrong with it.
    if highest >= max(examples, _INFERRED_CLASSES) and labels[0].ndim == 1:
        raise DataError(
            f"{name}: labels go up to {highest:.0f} in {examples} examples; say "
            f"task='regression' if they are amounts, or classes=... if there are so many classes"
        )
    return int(highest) + 1 if np.isfinite(highest) else 1


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


def _listed(texts: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, texts[:most])) + (", ..." if len(texts) > most else "")
    return f"label {shown} is" if len(texts) == 1 else f"labels {shown} are"


def _owners(owners: ArrayLike, key: str, name: str) -> Array:
    array = _array(owners, f"owners of key {key!r}", name)
    if array.ndim != 1:
        raise DataError(f"{name}: key {key!r} must have shape [N], not {array.shape}")
    return array
