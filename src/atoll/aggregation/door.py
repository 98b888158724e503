"""The door: an update that is not what it should be is refused, with a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Schema
from atoll.errors import UpdateRefused
from atoll.updates import Update
from atoll.vectors import describe_names

#: Lighter updates would lose digits in fixed point, heavier ones would not fit it.
WEIGHT_LEAST, WEIGHT_LIMIT = 2.0**-20, 2.0**40
METRIC_LIMIT = 64


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


def _match(kind: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if set(given) != set(wanted):
        raise UpdateRefused(
            f"its {kind} are {describe_names(given)}, but {describe_names(wanted)} were asked for"
        )


def _vector(name: str, vector: NDArray[Any], size: int, dtype: np.dtype[Any]) -> None:
    if vector.shape != (size,) or vector.dtype != dtype:
        raise UpdateRefused(
            f"{name!r} is {vector.dtype} {list(vector.shape)}, but {dtype} [{size}] was asked for"
        )
    if dtype.kind == "f" and not np.isfinite(vector).all():
        raise UpdateRefused(
            f"{name!r} holds {int((~np.isfinite(vector)).sum())} values that are NaN or infinite"
        )
