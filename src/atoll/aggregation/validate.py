"""Validation: an update that is not what its schema says is refused, with a sentence."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import Schema, Spec
from atoll.core import room
from atoll.core.updates import Update
from atoll.core.vectors import Vectors, describe_names
from atoll.errors import UpdateRefused

NAME_LIMIT = 64
TILE = 1 << 16


def validate(update: Update, schema: Schema) -> None:
    """Raise `UpdateRefused` unless the update is complete, well-formed and finite."""
    absent = {name for name, share in update.shares.items() if share == 0}
    _match("vectors", {*update.vectors, *absent}, schema.vectors)
    _match("statistics", update.statistics, schema.statistics)
    for name in absent & set(update.vectors):
        raise UpdateRefused(f"{name!r} has share 0, and is there all the same")
    for name, vector in update.vectors.items():
        _array(name, vector, schema.vectors[name])
    for name, vector in update.statistics.items():
        _array(name, vector, schema.statistics[name])
    _weight(update.weight, schema)
    _shares(update.shares, schema)
    _metrics(update.metrics, schema)


def validate_rows(
    vectors: Vectors,
    statistics: Vectors,
    weights: Sequence[float],
    metrics: Mapping[str, Sequence[float]],
    schema: Schema,
    finite: Container[str] = (),
) -> list[str]:
    """Why each of C updates, given as rows [C, ...], is refused; empty for those that pass.

    `finite` names those arrays of which it is known that all of their values are.
    """
    faults = [""] * len(weights)
    try:
        _match("vectors", vectors, schema.vectors)
        _match("statistics", statistics, schema.statistics)
        for name, rows in {**vectors, **statistics}.items():
            _shape(name, rows[0], {**schema.vectors, **schema.statistics}[name])
    except UpdateRefused as refusal:
        return [str(refusal)] * len(weights)
    # A sum is NaN or infinite if anything in it is; it may also overflow, so a row is looked at.
    doubtful = np.zeros(len(weights), bool)
    for name, rows in {**vectors, **statistics}.items():
        if rows.dtype.kind == "f" and name not in finite:
            with np.errstate(all="ignore"):
                doubtful |= ~np.isfinite(rows.reshape(len(rows), -1).sum(axis=1))
    for name, column in metrics.items():
        low, high = schema.metrics[name]
        values = np.asarray(column, np.float64)
        doubtful |= np.isfinite(values) & ((values < low) | (values > high))
    least, most = schema.weights
    for c, weight in enumerate(weights):
        if doubtful[c] or not least <= weight <= most:
            try:
                validate(
                    Update(
                        {name: rows[c] for name, rows in vectors.items()},
                        weight,
                        {name: rows[c] for name, rows in statistics.items()},
                        {name: column[c] for name, column in metrics.items()},
                    ),
                    schema,
                )
            except UpdateRefused as refusal:
                faults[c] = str(refusal)
    return faults


def _weight(weight: float, schema: Schema) -> None:
    least, most = schema.weights
    if math.isfinite(weight) and least <= weight <= most:
        return
    if least == most:
        raise UpdateRefused(f"its weight is {weight:g}, but here every update has weight {most:g}")
    raise UpdateRefused(
        f"its weight is {weight}, which is not a number from {least:.3g} to {most:.3g}; weights "
        "are relative, so scale them, e.g. to examples"
    )


def _shares(shares: Mapping[str, float], schema: Schema) -> None:
    for name, share in shares.items():
        spec = schema.vectors.get(name)
        if spec is None or not (spec.optional or share == 1):
            raise UpdateRefused(f"{_short(name)!r} may not be left out, or count for less")
        if not 0 <= share <= 1:
            raise UpdateRefused(f"the share of {name!r} is {share}, which is not from 0 to 1")


def _metrics(metrics: Mapping[str, float], schema: Schema) -> None:
    for name, value in metrics.items():
        if name not in schema.metrics:
            known = describe_names(schema.metrics)
            raise UpdateRefused(f"it reports a metric {_short(name)!r}; metrics are {known}")
        least, most = schema.metrics[name]
        # What is not finite says that training diverges; it is left out of the means.
        if math.isfinite(value) and not least <= value <= most:
            raise UpdateRefused(
                f"its metric {name!r} is {value:g}, which is not from {least:g} to {most:g}"
            )


def _match(kind: str, given: Iterable[str], wanted: Mapping[str, Any]) -> None:
    names = set(given)
    if names != set(wanted):
        shown = describe_names(_short(name) for name in sorted(names)[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UpdateRefused(
            f"its {kind} are {shown}{more}, but {describe_names(wanted)} were asked for"
        )


def _shape(name: str, array: NDArray[Any], spec: Spec) -> None:
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        raise UpdateRefused(
            f"{name!r} is {array.dtype} {list(array.shape)}, but {spec} was asked for"
        )


def _array(name: str, array: NDArray[Any], spec: Spec) -> None:
    _shape(name, array, spec)
    if array.dtype.kind == "f":
        flat = array.reshape(-1)
        # In tiles: a mask of a whole model is a quarter of it.
        wrong = 0
        for first, last in room.pieces(len(flat), flat.itemsize):
            tiles = (flat[start : min(start + TILE, last)] for start in range(first, last, TILE))
            wrong += sum(map(_wrong, tiles))
            room.rest(flat, first, last)
        if wrong:
            raise UpdateRefused(f"{name!r} holds {wrong} values that are NaN or infinite")


def _wrong(tile: NDArray[Any]) -> int:
    """How many values are NaN or infinite."""
    # A sum is if anything in it is; it may also overflow.
    with np.errstate(all="ignore"):
        if np.isfinite(tile.sum()):
            return 0
    return len(tile) - int(np.isfinite(tile).sum())


def _short(name: str) -> str:
    """A stranger's name, fit for a sentence."""
    return "".join(c if c.isprintable() else "?" for c in name[:NAME_LIMIT])
