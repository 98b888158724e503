"""Messages: an update as named arrays with its weight and figures beside them, and as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from atoll.aggregation.schema import Schema
from atoll.core import safetensors
from atoll.core.updates import Update
from atoll.core.vectors import Vectors, flatten
from atoll.errors import RunError, UpdateRefused

T = TypeVar("T")
WEIGHT, METRIC, SHARE = "weight", "metric/", "share/"
#: 17 digits give a float64 back exactly; one width for all lets no size depend on a value.
NUMBER = "+24.16e"


def _written(name: str, value: float) -> str:
    try:
        return format(float(value), NUMBER)
    except (TypeError, ValueError, OverflowError):
        raise RunError(
            f"an update's {name.rpartition('/')[2]!r} is {type(value).__name__}, not a number: "
            "weights and metrics are floats"
        ) from None


def _figures(message: Update) -> dict[str, str]:
    """Weight, metrics and shares as they travel."""
    figures: dict[str, float] = {WEIGHT: message.weight}
    figures |= {METRIC + name: value for name, value in message.metrics.items()}
    figures |= {SHARE + name: value for name, value in message.shares.items()}
    return {name: _written(name, value) for name, value in figures.items()}


def _arrays(message: Update) -> Vectors:
    return flatten({"vectors": message.vectors, "statistics": message.statistics})


def message_size(message: Update) -> int:
    """Bytes of an update on the wire."""
    return safetensors.size(_arrays(message), _figures(message))


def schema_size(schema: Schema) -> int:
    """Bytes of a message of this schema that leaves nothing out."""
    shares = {name: 1.0 for name, spec in schema.vectors.items() if spec.optional}
    metrics = dict.fromkeys(schema.metrics, 0.0)
    nothing = Update(
        {name: spec.zeros() for name, spec in schema.vectors.items()},
        statistics={name: spec.zeros() for name, spec in schema.statistics.items()},
        metrics=metrics,
        shares=shares,
    )
    return message_size(nothing)


def pack(message: Update) -> list[bytes | memoryview]:
    """Pieces to write one after the other; the arrays are views, not copies."""
    return safetensors.encode(_arrays(message), _figures(message))


def unpack(data: bytes | memoryview) -> Update:
    """The update that `pack` wrote; raises `UpdateRefused` for bytes that are no message."""
    try:
        arrays, about = safetensors.decode(data)
        figures = {name: float(text) for name, text in about.items()}
        weight = figures.pop(WEIGHT)
    except safetensors.WireError as error:
        raise UpdateRefused(f"it is not a message: {error}") from error
    except (ValueError, KeyError):
        raise UpdateRefused("its weight or a metric is missing or not a number") from None
    if not all(name.startswith((METRIC, SHARE)) for name in figures):
        raise UpdateRefused("it has figures that are neither metrics nor shares")
    if not all(name.startswith(("vectors/", "statistics/")) for name in arrays):
        raise UpdateRefused("it has arrays that are neither vectors nor statistics")
    return Update(
        _under("vectors/", arrays),
        weight,
        _under("statistics/", arrays),
        _under(METRIC, figures),
        _under(SHARE, figures),
    )


def _under(prefix: str, given: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): v for name, v in given.items() if name.startswith(prefix)}


def largest(schema: Schema) -> int:
    """Bytes that no honest message of this schema exceeds: its arrays, and a header."""
    return schema.nbytes + safetensors.HEADER_LIMIT
