"""The door: an update that is not what it should be is refused, with a sentence."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Schema
from atoll.core.updates import Update
from atoll.core.vectors import Vectors, describe_names
from atoll.errors import UpdateRefused

#: Lighter updates would lose digits in fixed point, heavier ones would not fit it.
WEIGHT_LEAST, WEIGHT_LIMIT = 2.0**-20, 2.0**40
METRIC_LIMIT = 64
NAME_LIMIT = 64
TILE = 1 << 18


def admit(update: Update, schema: Schema) -> None:
    """Raise `UpdateRefused` unless the update is complete, well-formed and finite."""
    _match("vectors", update.vectors, schema.vectors)
    _match("statistics", update.statistics, schema.statistics)
    for name, vector in update.vectors.items():
        _vector(name, vector, schema.vectors[name], np.dtype(np.float32))
    for name, vector in update.statistics.items():
        _vector(name, vector, schema.statistics[name], schema.dtype(name))
    if not (math.isfinite(update.weight) and WEIGHT_LEAST <= update.weight <= WEIGHT_LIMIT):
        raise UpdateRefused(
            f"its weight is {update.weight}, which is not a number from 1e-6 to 1e12; weights are "
            "relative, so scale them, e.g. to examples"
        )
    if len(update.metrics) > METRIC_LIMIT:
        raise UpdateRefused(f"it reports more than {METRIC_LIMIT} metrics")
    if any(not name.isprintable() or len(name) > NAME_LIMIT for name in update.metrics):
        raise UpdateRefused(
            f"a metric has a name that is longer than {NAME_LIMIT} characters, or not printable"
        )


def validate_rows(
    vectors: Vectors,
    statistics: Vectors,
    weights: Sequence[float],
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
    except UpdateRefused as refusal:
        return [str(refusal)] * len(weights)
    arrays = {**vectors, **statistics}
    # A sum is NaN or infinite if anything in it is; it may also overflow, so a row is looked at.
    doubtful = np.zeros(len(weights), bool)
    for name, rows in arrays.items():
        if rows.dtype.kind == "f" and name not in finite:
            with np.errstate(all="ignore"):
                doubtful |= ~np.isfinite(rows.sum(axis=1))
    for c, weight in enumerate(weights):
        if doubtful[c] or not WEIGHT_LEAST <= weight <= WEIGHT_LIMIT:
            try:
                admit(
                    Update(
                        {name: rows[c] for name, rows in vectors.items()},
                        weight,
                        {name: rows[c] for name, rows in statistics.items()},
                    ),
                    schema,
                )
            except UpdateRefused as refusal:
                faults[c] = str(refusal)
    for name, rows in arrays.items():
        size = {**schema.vectors, **schema.statistics}[name]
        if rows.shape[1] != size:
            return [f"{name!r} has {rows.shape[1]} values, but {size} were asked for"] * len(faults)
    return faults


def _match(kind: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if set(given) != set(wanted):
        shown = describe_names(name[:NAME_LIMIT] for name in sorted(given)[:5])
        more = f" and {len(given) - 5} more" if len(given) > 5 else ""
        raise UpdateRefused(
            f"its {kind} are {shown}{more}, but {describe_names(wanted)} were asked for"
        )


def _vector(name: str, vector: NDArray[Any], size: int, dtype: np.dtype[Any]) -> None:
    if vector.shape != (size,) or vector.dtype != dtype:
        raise UpdateRefused(
            f"{name!r} is {vector.dtype} {list(vector.shape)}, but {dtype} [{size}] was asked for"
        )
    if dtype.kind == "f":
        # In tiles: a mask of a whole model is a quarter of it.
        tiles = (vector[start : start + TILE] for start in range(0, size, TILE))
        wrong = sum(len(tile) - int(np.isfinite(tile).sum()) for tile in tiles)
        if wrong:
            raise UpdateRefused(f"{name!r} holds {wrong} values that are NaN or infinite")
