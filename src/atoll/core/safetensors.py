"""Named arrays as bytes: the safetensors layout, written and read by hand without copies.

Eight bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets},
"__metadata__": {str: str}}, then the arrays back to back. Any safetensors library reads it.
Bytes from outside are bounded and checked against this closed schema before anything is built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core import room
from atoll.core.vectors import Vectors
from atoll.errors import AtollError

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 1 << 20
ALIGNMENT = 8
SIZE_LIMIT = 1 << 48
NAME_LIMIT = 256


class WireError(AtollError):
    """Bytes that are not what they should be."""


def ordered(vectors: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The arrays as they are written: wide numbers first, so that all of them lie aligned."""
    widths = {vector.dtype.itemsize for vector in vectors.values()}
    if len(widths) < 2:
        return vectors
    return dict(sorted(vectors.items(), key=lambda item: -item[1].dtype.itemsize))


def header(vectors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Everything that comes before the arrays, which are in the order of `ordered`."""
    plan: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, vector in vectors.items():
        if vector.dtype not in NAMES:
            raise WireError(
                f"array {name!r} is {vector.dtype}, which does not travel; {', '.join(DTYPES)} do"
            )
        plan[name] = {
            "dtype": NAMES[vector.dtype],
            "shape": list(vector.shape),
            "data_offsets": [offset, offset + vector.nbytes],
        }
        offset += vector.nbytes
    text = json.dumps(plan, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def encode(
    vectors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """Pieces to write one after the other; the arrays are views, not copies."""
    vectors = ordered(vectors)
    pieces: list[bytes | memoryview] = [header(vectors, metadata or {})]
    pieces += [
        np.ascontiguousarray(vector).reshape(-1).data.cast("B")
        for vector in vectors.values()
        if vector.size
    ]
    return pieces


def passed(
    vectors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """What `encode` makes, in pieces; large arrays that lie in files leave memory as they go."""
    vectors = ordered(vectors)
    yield header(vectors, metadata)
    for vector in vectors.values():
        flat = np.ascontiguousarray(vector).reshape(-1)
        for start, stop in room.pieces(len(flat), flat.itemsize):
            yield flat[start:stop].data.cast("B")
            room.rest(flat, start, stop)


def size(vectors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> int:
    """How many bytes `encode` would make."""
    return len(header(ordered(vectors), metadata or {})) + sum(v.nbytes for v in vectors.values())


def decode(data: bytes | memoryview) -> tuple[Vectors, dict[str, str]]:
    """Arrays (views of `data`) and metadata; `WireError` says what is wrong with the bytes."""
    view = memoryview(data).cast("B")
    if len(view) < 8:
        raise WireError(f"the data end after {len(view)} bytes, before the header")
    length = int.from_bytes(view[:8], "little")
    if length > HEADER_LIMIT:
        raise WireError("the header is longer than 1 MiB, or these are not safetensors data")
    if 8 + length > len(view):
        raise WireError("the data end inside the header: they are cut off")
    try:
        plan = json.loads(str(view[8 : 8 + length], "utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise WireError("the header is not JSON, or names something twice") from None
    if not isinstance(plan, dict):
        raise WireError("the header is not a JSON object")
    metadata = plan.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WireError("the metadata are not names and strings")
    for name in (*plan, *metadata):
        # Names end up in sentences, logs and databases.
        if not (name.isprintable() and len(name) <= NAME_LIMIT):
            raise WireError(f"a name is longer than {NAME_LIMIT} characters, or not printable")
    body = view[8 + length :]
    vectors: Vectors = {}
    expected = 0
    for name, entry in plan.items():
        vector, expected = _read(name, entry, body, expected)
        vectors[name] = vector
    if expected != len(body):
        raise WireError(f"the header promises {expected} bytes of arrays, but {len(body)} follow")
    return vectors, metadata


def _read(name: str, entry: Any, body: memoryview, start: int) -> tuple[NDArray[Any], int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"array {name!r} is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise WireError(f"array {name!r} has a dtype that is not one of {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(_natural(side) for side in shape):
        raise WireError(f"array {name!r} has a shape that is not a short list of natural numbers")
    if math.prod(max(side, 1) for side in shape) >= SIZE_LIMIT:
        raise WireError(f"array {name!r} has a shape that no array can have")
    end = start + math.prod(shape) * dtype.itemsize
    if entry["data_offsets"] != [start, end] or not all(map(_natural, entry["data_offsets"])):
        raise WireError(f"array {name!r} does not lie where its shape puts it")
    if end > len(body):
        raise WireError(f"array {name!r} is cut off: {len(body) - start} of {end - start} bytes")
    return np.frombuffer(body[start:end], dtype).reshape(shape), end


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < SIZE_LIMIT


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
