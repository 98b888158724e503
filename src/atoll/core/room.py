"""Room: large arrays in mapped files, which leave a process's memory while nobody looks at them.

Resident memory is what a server of large models runs out of first. What lies in a file that is
mapped need not stay there: pages that were read or written are let go piece by piece, and come back
from the file when they are asked for. Small arrays, and all arrays where nobody has said `room_in`
or the system cannot do it, are plain ones; the numbers are the same wherever they lie.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

#: Bytes from which on an array is large, and that are gone through at a time.
LARGE, STEP = 1 << 24, 1 << 22

_folder: ContextVar[Path | None] = ContextVar("atoll_room", default=None)
_able = hasattr(mmap.mmap, "madvise") and hasattr(os, "posix_fallocate")


class Mapping(mmap.mmap):
    """A mapped file whose pages may be let go at any time, because the file says the same."""

    #: The file itself, open for as long as this is, where it is only read.
    file: int | None = None


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """While this lasts, large arrays of `zeros` lie in nameless files of this folder."""
    before = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(before)


def zeros(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """Zeros [size]; large ones in a mapped file where there is room, which ends with them."""
    folder, nbytes = _folder.get(), size * np.dtype(dtype).itemsize
    if folder is not None and nbytes >= LARGE and _able:
        # On a full disk memory has to do. A file with holes would end the process later on.
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return np.frombuffer(Mapping(file.fileno(), nbytes), dtype)
    return np.zeros(size, dtype)


def opened(path: Path, *, writable: bool = False) -> Mapping:
    """A file's bytes, read where they are needed; unmapped with the last view of them.

    `writable` lets arrays be made of them that can be written to, for libraries that ask for it.
    Nothing of that reaches the file, and `rest` brings the file's bytes back.
    """
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    with path.open("rb") as file:
        mapping = Mapping(file.fileno(), 0, access=access)
        if not writable and hasattr(os, "preadv"):
            mapping.file = os.dup(file.fileno())
            weakref.finalize(mapping, os.close, mapping.file)
    return mapping


def lies_in_file(array: NDArray[Any]) -> bool:
    """Whether a large array is a view of a mapped file, so that to keep it takes no memory."""
    return _able and array.nbytes >= LARGE and _mapping(array) is not None


def rest(array: NDArray[Any], start: int = 0, stop: int | None = None) -> None:
    """Let entries [start, stop) of a flat array leave memory, if it lies in a mapped file."""
    mapping = _mapping(array) if _able and array.nbytes >= LARGE else None
    if mapping is None:
        return
    origin = _origin(mapping)
    first = array.ctypes.data - origin + start * array.itemsize
    last = array.ctypes.data - origin + (len(array) if stop is None else stop) * array.itemsize
    first -= first % mmap.PAGESIZE
    last = min(last + -last % mmap.PAGESIZE, len(mapping))
    if last > first:
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def read(array: NDArray[Any], start: int, stop: int, into: NDArray[Any]) -> NDArray[Any]:
    """Entries [start, stop) of a flat array; what lies in a file is read `into` another array.

    To look at it where it is mapped would bring in more than is asked for, as much as the system
    likes to at a time, and from every file.
    """
    mapping = _mapping(array)
    if mapping is None or mapping.file is None:
        return array[start:stop]
    part = into[: stop - start]
    place = array.ctypes.data - _origin(mapping) + start * array.itemsize
    if os.preadv(mapping.file, [part.view(np.uint8).data], place) != part.nbytes:
        return array[start:stop]
    return part


def difference(after: Any, before: Any) -> Any:
    """`after - before`; of large NumPy vectors piece by piece, while `before` leaves memory."""
    if not (
        isinstance(after, np.ndarray)
        and isinstance(before, np.ndarray)
        and after.ndim == 1
        and (after.shape, after.dtype) == (before.shape, before.dtype)
        and after.nbytes >= LARGE
    ):
        return after - before
    out = np.empty_like(after)
    for start, stop in pieces(len(out), out.itemsize):
        np.subtract(after[start:stop], before[start:stop], out=out[start:stop])
        rest(before, start, stop)
    return out


def pieces(size: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of one piece of STEP bytes after the other."""
    step = STEP // itemsize
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _origin(mapping: Mapping) -> int:
    """Where the first of its bytes lies."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


def _mapping(array: NDArray[Any]) -> Mapping | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, Mapping) else None
