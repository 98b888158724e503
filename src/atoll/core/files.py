"""Checkpoints: a run between two rounds as one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core import safetensors
from atoll.core.vectors import Vectors
from atoll.errors import CheckpointError

FORMAT = 1
CHUNK = 1 << 20


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file so that after any crash it is there in full or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "nt":  # a folder cannot be synced there
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}; free some space, then "
            "resume the run"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs, whole or not at all."""
    write_atomically(path, [json.dumps(value, indent=2).encode() + b"\n"])


def save(
    path: Path, kind: str, about: Mapping[str, Any], vectors: Mapping[str, NDArray[Any]]
) -> None:
    """Write vectors with what they are about and a digest of their bytes."""
    body = sha256()
    for piece in safetensors.encode(vectors)[1:]:
        body.update(piece)
    label = {"format": FORMAT, "kind": kind, "sha256": body.hexdigest(), **about}
    write_atomically(
        path, safetensors.encode(vectors, {"atoll": json.dumps(label, separators=(",", ":"))})
    )


def load(path: Path, kind: str) -> tuple[dict[str, Any], Vectors]:
    """Read what `save` wrote; `CheckpointError` says what is wrong with the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        vectors, metadata = safetensors.decode(data)
    except safetensors.WireError as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}") from error
    try:
        label = json.loads(metadata["atoll"])
        body, stated, stored = sha256(), label.pop("sha256"), label.pop("kind")
        version = label.pop("format")
    except (KeyError, ValueError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is a safetensors file, but not one of atoll's") from None
    if version != FORMAT or stored != kind:
        raise CheckpointError(f"{path} is a {stored} of format {version}, not a {kind} of {FORMAT}")
    for piece in safetensors.encode(vectors)[1:]:
        body.update(piece)
    if body.hexdigest() != stated:
        raise CheckpointError(f"{path} is damaged: its contents do not match their digest")
    return label, {name: np.array(vector) for name, vector in vectors.items()}


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    body = sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            body.update(piece)
    return body.hexdigest()
