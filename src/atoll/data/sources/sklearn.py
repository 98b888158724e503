"""scikit-learn's bunches: what its `load_*`, `fetch_*` and `make_*` functions give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from atoll.data.arrow import read_table
from atoll.data.dataset import Dataset
from atoll.data.encoding.encoding import inputs_of, names_of
from atoll.data.encoding.kinds import NoValue, fitted
from atoll.data.sources.arrays import from_arrays
from atoll.data.tasks import Task, may_be_labels
from atoll.errors import DataError


def from_sklearn(
    bunch: Mapping[str, Any],
    *,
    task: Task | str | None = None,
    classes: int | None = None,
    keys: Mapping[str, ArrayLike] | None = None,
    test: Mapping[str, Any] | tuple[ArrayLike, ArrayLike] | None = None,
    no_value: NoValue = (),
    name: str | None = None,
) -> Dataset:
    """The `data` [N, F] and `target` [N] or [N, D] of a bunch, frames included.

    A frame with text or categorical columns is encoded as `from_table` does, with its
    `no_value`. `target_names` become the class names of a classification set. `test` is another
    bunch of the same kind (the `subset="test"` of some sets) or a pair (x, y). The rest is as in
    `from_arrays`.

    Raises DataError where `data` or `target` is missing or does not fit.
    """
    name = name or _name(bunch)
    data, target = _part(bunch, name)
    columns = tuple(map(str, getattr(data, "columns", ())))
    if _is_mixed_frame(data):
        data, test, columns = _encoded(data, test, name, no_value)
    held_out = _part(test, f"{name}, test part") if isinstance(test, Mapping) else test
    return from_arrays(
        data,
        target,
        task=task,
        classes=classes,
        keys=keys,
        test=held_out,
        name=name,
        class_names=_class_names(bunch, target, task, classes),
        describe=_title(bunch),
        columns=columns,
    )


def _part(bunch: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    if not isinstance(bunch, Mapping):
        raise DataError(
            f"{name}: from_sklearn takes a bunch with data and target, "
            f"not {type(bunch).__name__!r}; for a pair (x, y) use from_arrays"
        )
    for part in ("data", "target"):
        if bunch.get(part) is None:
            raise DataError(f"{name}: the bunch has no {part!r}; load it with its {part}")
    return bunch["data"], bunch["target"]


def _is_mixed_frame(data: Any) -> bool:
    """Whether these are columns that `np.asarray` would not make numbers of."""
    return hasattr(data, "__arrow_c_stream__") and not all(
        isinstance(dtype, np.dtype) and dtype.kind in "fiu"
        for dtype in getattr(data, "dtypes", (None,))
    )


def _encoded(
    data: Any, test: Any, name: str, no_value: NoValue
) -> tuple[Any, Any, tuple[str, ...]]:
    table = read_table(data, name)
    columns = fitted(table, table.column_names, "refuse", name, no_value)
    inputs = inputs_of(columns, table, name)
    if test is None:
        return inputs, None, names_of(columns)
    part = f"{name}, test part"
    held_out, target = _part(test, part) if isinstance(test, Mapping) else test
    return inputs, (inputs_of(columns, read_table(held_out, part), part), target), names_of(columns)


def _class_names(
    bunch: Mapping[str, Any], target: Any, task: Task | str | None, classes: int | None
) -> tuple[str, ...]:
    """The names of the classes of whole targets; of other targets these names are no classes."""
    target = np.asarray(target)
    names = bunch.get("target_names")
    whole = target.dtype.kind in "iub" and target.ndim == 1 and target.size > 0
    if names is None or not may_be_labels(task) or not whole:
        return ()
    if len(names) <= target.max() or classes not in (None, len(names)):
        return ()
    return tuple(str(text) for text in names)


def _name(bunch: Mapping[str, Any]) -> str:
    if isinstance(bunch, Mapping):
        for text in ((bunch.get("details") or {}).get("name"), bunch.get("filename")):
            if isinstance(text, str) and text:
                return PurePath(text).name.partition(".")[0]
    return "sklearn"


def _title(bunch: Mapping[str, Any]) -> str:
    lines = (line.strip() for line in str(bunch.get("DESCR") or "").splitlines())
    # A description opens with a reStructuredText anchor, then the title.
    return next((line for line in lines if re.match(r"\w", line)), "")
