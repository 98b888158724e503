"""Checkpoints: a run between two rounds as one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.core import safetensors
from atoll.core.vectors import Vectors
from atoll.errors import CheckpointError, ConfigurationError

FORMAT = 1
CHUNK = 1 << 20
#: Bytes that are written at a time, and after which the disk is to begin.
BLOCK = 1 << 23


class Hash(Protocol):
    """A hash in the making."""

    def update(self, data: bytes | memoryview, /) -> None: ...


def write_atomically(
    path: Path, pieces: Iterable[bytes | memoryview], body: Hash | None = None
) -> None:
    """Write a file so that after any crash it is there in full or not at all.

    `body` is a hash that is told of every byte on the way.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                for start in range(0, len(view), BLOCK):
                    block = view[start : start + BLOCK]
                    file.write(block)
                    if body is not None:
                        body.update(block)
                    begin_writing(file, len(block))
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


def own_folder(path: Path, *marks: str) -> None:
    """Make a folder that nobody else can read; one that is there is empty, or ours by one of these.

    Raises `ConfigurationError` for any other, whose rights are nobody's to take.
    """
    if path.is_dir() and any(path.iterdir()) and not any((path / mark).exists() for mark in marks):
        raise ConfigurationError(f"{path} holds other things; give a folder of its own")
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def begin_writing(file: IO[bytes], length: int) -> None:
    """Let the disk begin with what was just written of a large file: a sync will be the shorter."""
    if length >= CHUNK and hasattr(os, "posix_fadvise"):
        end = file.tell()
        # Pages that are still to be written stay where they are; this is what starts them.
        os.posix_fadvise(file.fileno(), end - length, length, os.POSIX_FADV_DONTNEED)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs, whole or not at all."""
    write_atomically(path, [json.dumps(value, indent=2).encode() + b"\n"])


def save(
    path: Path, kind: str, about: Mapping[str, Any], vectors: Mapping[str, NDArray[Any]]
) -> None:
    """Write vectors with what they are about and a digest of their bytes."""
    body = sha256()
    pieces = safetensors.passed(vectors, {})
    next(pieces)
    for piece in pieces:
        body.update(piece)
    label = {"format": FORMAT, "kind": kind, "sha256": body.hexdigest(), **about}
    metadata = {"atoll": json.dumps(label, separators=(",", ":"))}
    write_atomically(path, safetensors.passed(vectors, metadata))


def load(path: str | Path, kind: str) -> tuple[dict[str, Any], Vectors]:
    """Read what `save` wrote; `CheckpointError` says what is wrong with the file."""
    try:
        data = Path(path).read_bytes()
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
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
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
    return str(file_hash(path).hexdigest())


def file_hash(path: Path) -> Any:
    """SHA-256 of a file so far, to be told of what is appended."""
    body, piece = sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(piece):
            body.update(piece[:length])
    return body
