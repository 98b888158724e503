"""Client states: what clients remember between rounds; in memory up to a limit, then on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from atoll.core import safetensors
from atoll.core.vectors import Vectors
from atoll.errors import CheckpointError

#: The round in which a memory was made, and the memory.
Memory = tuple[int, Vectors]
LIMIT = 256 << 20


class ClientStates(MutableMapping[int, Memory]):
    """States by member. The oldest leave for a temporary folder when there are too many.

    Args:
        limit: bytes to keep in memory; the folder is made when they are exceeded.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._held = limit, 0
        # In the order in which they were made: the oldest come first.
        self._near: dict[int, Memory] = {}
        self._far: dict[int, int] = {}
        self._folder: Path | None = None

    def __getitem__(self, member: int) -> Memory:
        if member in self._near:
            return self._near[member]
        round = self._far[member]
        vectors, _ = safetensors.decode(memoryview(bytearray(self._path(member).read_bytes())))
        return round, vectors

    def __setitem__(self, member: int, memory: Memory) -> None:
        if member in self:
            del self[member]
        self._near[member] = memory
        self._held += _size(memory)
        while self._held > self._limit and len(self._near) > 1:
            self._send_away(next(iter(self._near)))

    def __delitem__(self, member: int) -> None:
        if member in self._near:
            self._held -= _size(self._near.pop(member))
            return
        del self._far[member]
        self._path(member).unlink()

    def __iter__(self) -> Iterator[int]:
        yield from [*self._near, *self._far]

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def __contains__(self, member: object) -> bool:
        return member in self._near or member in self._far

    def rounds(self) -> dict[int, int]:
        """The round in which each memory was made; none is read for that."""
        return {**{member: round for member, (round, _) in self._near.items()}, **self._far}

    def _send_away(self, member: int) -> None:
        round, vectors = self._near[member]
        path = self._path(member)
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                for piece in safetensors.encode(vectors):
                    file.write(piece)
        except OSError as error:
            raise CheckpointError(
                f"what clients remember does not fit in memory, and {path.parent} cannot be "
                f"written: {error.strerror or error}; free some space or set TMPDIR"
            ) from error
        self._far[member] = round
        self._held -= _size(self._near.pop(member))

    def _path(self, member: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="atoll-memories-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"{member % 256:02x}" / str(member)


def _size(memory: Memory) -> int:
    return sum(vector.nbytes for vector in memory[1].values())
