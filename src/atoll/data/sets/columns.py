"""Turning raw columns into numbers with constants that are written down, never learnt.

Scaling by the mean of the data would let every client's rows reach every other client before
training starts; fixed centres and spreads, fixed lists of categories and a fixed hash do not.
The constants are round numbers that were chosen once, near the middle of the published data.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError

Floats = NDArray[np.float64]
#: Centre and spread of a number: it becomes (number - centre) / spread.
Scale = tuple[float, float]

#: Every byte that is not part of a word becomes a space.
_LETTERS = bytes(
    byte if chr(byte) in "abcdefghijklmnopqrstuvwxyz0123456789'" else 32 for byte in range(256)
)


def numbers(column: Iterable[str], missing: tuple[str, ...] = ("",)) -> Floats:
    """Text to numbers, NaN where the text is one of `missing`."""
    return np.array([np.nan if text in missing else float(text) for text in column])


def scaled(values: Floats, scale: Scale, limit: float = np.inf) -> Floats:
    """[N, 1]: scaled, clipped to +-limit, and 0 (the centre) where missing."""
    centre, spread = scale
    return np.clip(np.nan_to_num((values - centre) / spread), -limit, limit)[:, None]


def scaled_or_missing(values: Floats, scale: Scale, limit: float = np.inf) -> Floats:
    """[N, 2]: the scaled value and a flag that is 1 where it was missing."""
    return np.hstack([scaled(values, scale, limit), np.isnan(values)[:, None]])


def flags(column: Iterable[str], yes: str) -> Floats:
    """[N, 1]: 1 where the text is `yes`."""
    return np.array([text == yes for text in column], dtype=np.float64)[:, None]


def positions(column: Sequence[str], categories: Sequence[str], where: str) -> NDArray[np.int64]:
    """Which of the categories each text is."""
    place = {category: index for index, category in enumerate(categories)}
    try:
        return np.fromiter((place[text] for text in column), dtype=np.int64, count=len(column))
    except KeyError as error:
        raise DataError(
            f"{where}: {error.args[0]!r} is not among the known values: {', '.join(categories)}"
        ) from None


def one_hot(column: Sequence[str], categories: Sequence[str], where: str) -> Floats:
    """[N, categories]: 1 in the column of the category."""
    return np.eye(len(categories))[positions(column, categories, where)]


def side_by_side(*blocks: Floats) -> NDArray[np.float32]:
    """Blocks of columns as one table of inputs."""
    return np.hstack(blocks).astype(np.float32)


def padded(identifiers: Iterable[int], width: int) -> NDArray[np.str_]:
    """Numbers as names of equal length, so that names sort as the numbers do."""
    return np.array([f"{identifier:0{width}d}" for identifier in identifiers])


def listed(names: str) -> tuple[str, ...]:
    """Names that are written with spaces between them."""
    return tuple(names.split())


class _Buckets(dict[bytes, int]):
    """The column of each word; crc32, because Python's own hash differs from run to run."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __missing__(self, word: bytes) -> int:
        bucket = self[word] = zlib.crc32(word) % self.width
        return bucket


def words(text: str) -> list[bytes]:
    """Runs of letters a to z, digits and apostrophes, in lower case."""
    # Bytes because their translate and split are several times as fast as a regular expression.
    return text.lower().encode("ascii", "replace").translate(_LETTERS).split()


def hashed_words(texts: Sequence[str], width: int) -> NDArray[np.float32]:
    """[N, width]: how often the words of each bucket occur, scaled to length 1 (or all zero)."""
    buckets = _Buckets(width)
    counts = np.zeros((len(texts), width), dtype=np.float32)
    for row, text in zip(counts, texts, strict=True):
        found = words(text)
        columns = np.fromiter(map(buckets.__getitem__, found), dtype=np.int64, count=len(found))
        row[:] = np.bincount(columns, minlength=width)
    lengths = np.linalg.norm(counts, axis=1, keepdims=True)
    counts /= np.where(lengths > 0, lengths, 1)
    return counts


def windows(series: NDArray[np.float32], length: int, step: int) -> NDArray[np.float32]:
    """[T, channels] to [windows, channels, length]; a rest that fills no window is dropped."""
    if len(series) < length:
        return np.empty((0, series.shape[1], length), dtype=np.float32)
    return np.lib.stride_tricks.sliding_window_view(series, length, axis=0)[::step]
