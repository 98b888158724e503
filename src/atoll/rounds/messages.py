"""Messages: an update as named arrays with its weight and metrics beside them, and as bytes."""

from __future__ import annotations

from collections.abc import Mapping

from atoll.aggregation.stage import Schema
from atoll.core import safetensors
from atoll.core.updates import Update
from atoll.core.vectors import STATISTICS
from atoll.errors import RunError, UpdateRefused

WEIGHT = "weight"
#: 17 digits give a float64 back exactly; one width for all lets no size depend on a value.
NUMBER = "+24.16e"


def metadata(weight: float, metrics: Mapping[str, float]) -> dict[str, str]:
    """An update's weight and metrics as they travel."""
    return {name: _written(name, value) for name, value in {**metrics, WEIGHT: weight}.items()}


def _written(name: str, value: float) -> str:
    try:
        return format(float(value), NUMBER)
    except (TypeError, ValueError, OverflowError):
        raise RunError(
            f"an update's {name!r} is {type(value).__name__}, not a number: weights and metrics "
            "are floats"
        ) from None


def message_size(message: Update) -> int:
    """Bytes of an update on the wire: its arrays and, as metadata, its weight and metrics."""
    about = metadata(message.weight, message.metrics)
    return safetensors.size({**message.vectors, **message.statistics}, about)


def pack(message: Update) -> list[bytes | memoryview]:
    """Pieces to write one after the other; the arrays are views, not copies."""
    about = metadata(message.weight, message.metrics)
    return safetensors.encode({**message.vectors, **message.statistics}, about)


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
    statistics = {str(name): array for name, array in arrays.items() if name in STATISTICS}
    vectors = {name: array for name, array in arrays.items() if name not in statistics}
    return Update(vectors, weight, statistics, figures)


def largest(schema: Schema) -> int:
    """Bytes that no honest message exceeds: every array at eight bytes a value, and a header."""
    values = sum(schema.vectors.values()) + sum(schema.statistics.values())
    return 8 * values + safetensors.HEADER_LIMIT
