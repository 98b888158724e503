"""Exact sums: fixed point in integers, so that order and grouping cannot matter.

A value is counted in units of 2^-40 and summed in int64. Before a sum could overflow, its upper
part is carried into a second int64 worth 2^32 units, so values up to 2^38 are summed exactly.
Integer addition is associative: any order, any split over workers and any restart give the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core import room
from atoll.core.vectors import Vectors

UNIT_BITS = 40
CARRY_BITS = 32
#: An int64 stays far from overflow while the magnitudes it has taken in add up to at most this.
ROOM = 1 << 62
#: Values from here on (in units) are summed in floats; below, 100,000 of them fit two words.
LIMIT = float(1 << 78)
TILE = 1 << 15
#: Added to a float64 below 2^51, this leaves its nearest whole number (halves to even) in the low
#: bits of the sum, which read as an integer exceed it by the bits of the constant itself.
MAGIC = 1.5 * 2.0**52
MAGIC_BITS = int(np.float64(MAGIC).view(np.int64))
MAGIC_LIMIT = float(1 << 51)
#: Whole numbers up to here are exact in float64.
EXACT = float(1 << 53)
#: Vectors in mapped files that wait to be added together, at most.
AT_ONCE = 16


class FixedSum:
    """The running sum of `weight * vector` for vectors of one size.

    What is too large for fixed point goes to a float64 sum, for which order matters in the last
    bits; `exact` says whether that has happened. Large vectors that lie in mapped files are not
    added as they come but some at a time, piece by piece; if those are all, then there is never a
    sum of the whole size.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._words = None if 8 * size >= room.LARGE else np.zeros(size, np.int64)
        self._later: list[tuple[NDArray[Any], float, int]] = []
        self._magic = 0
        self.high: NDArray[np.int64] | None = None
        self.floating: NDArray[np.float64] | None = None
        self._taken = 0

    @property
    def _low(self) -> NDArray[np.int64]:
        """The words of the sum, as they are now."""
        if self._words is None:
            self._words = room.zeros(self._size, np.int64)
        return self._words

    @property
    def low(self) -> NDArray[np.int64]:
        """The sum in units, without what was carried."""
        self._settle()
        if self._magic:
            surplus = _signed(self._magic * MAGIC_BITS)
            for start, stop in room.pieces(self._size, 8):
                part = self._low[start:stop]
                np.subtract(part, np.int64(surplus), out=part)
                room.rest(self._low, start, stop)
            self._magic = 0
        return self._low

    @property
    def exact(self) -> bool:
        return self.floating is None

    def add(self, vector: NDArray[Any], weight: float) -> None:
        """Add `weight * vector` [size], of floats or integers; all values must be finite."""
        if not vector.size:
            return
        scale = weight * float(1 << UNIT_BITS)
        peak = _peak(vector) * scale
        if peak < MAGIC_LIMIT and room.lies_in_file(vector):
            self._later.append((vector, scale, int(peak) + 1))
            if len(self._later) == AT_ONCE:
                self._settle()
        elif peak >= LIMIT:
            if self.floating is None:
                self.floating = np.zeros(len(vector))
            self.floating += weight * vector.astype(np.float64)
        elif peak >= MAGIC_LIMIT:
            self._add_wide(vector, scale)
        else:
            self._make_room(int(peak) + 1)
            _add_narrow(vector, scale, self._low)
            self._magic += 1

    def add_rows(self, rows: NDArray[Any], weights: Sequence[float]) -> None:
        """Add `weight * row` of every row [C, size], to the bit as if one after the other."""
        if not rows.size:
            return
        scales = np.array(weights, np.float64) * float(1 << UNIT_BITS)
        peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64) * scales
        if float(peaks.sum()) + len(rows) >= EXACT:
            for row, weight in zip(rows, weights, strict=True):
                self.add(row, weight)
            return
        self._make_room(int(peaks.sum()) + len(rows))
        # Whole numbers whose magnitudes add up to less than 2^53 are added exactly as floats.
        total = np.zeros(min(TILE // 4, rows.shape[1]))
        scratch = np.empty_like(total)
        for start in range(0, rows.shape[1], len(total)):
            part = rows[:, start : start + len(total)]
            floats, sums = scratch[: part.shape[1]], total[: part.shape[1]]
            sums.fill(0)
            for row, scale in zip(part, scales, strict=True):
                np.multiply(row, scale, out=floats, dtype=np.float64)
                np.rint(floats, out=floats)
                sums += floats
            self._low[start : start + len(total)] += sums.astype(np.int64)

    def add_units(self, units: NDArray[np.int64], bound: int) -> None:
        """Add what was summed elsewhere, in units, whose magnitudes came to at most `bound`."""
        self._make_room(bound)
        np.add(self.low, units, out=self._low)

    def state(self) -> Vectors:
        """The sum as arrays."""
        arrays: Vectors = {"low": self.low, "taken": np.array([self._taken], np.int64)}
        if self.high is not None:
            arrays["high"] = self.high
        if self.floating is not None:
            arrays["floating"] = self.floating
        return arrays

    def restore(self, state: Vectors) -> None:
        """Become the sum that `state` gave."""
        self._words, self._magic, self._later = state["low"].copy(), 0, []
        self._taken = int(state["taken"][0])
        self.high = state["high"].copy() if "high" in state else None
        self.floating = state["floating"].copy() if "floating" in state else None

    def merge(self, other: FixedSum) -> None:
        """Add another sum, as if its vectors had been added here."""
        other._settle()
        self._make_room(other._taken)
        np.add(self.low, other.low, out=self._low)
        if other.high is not None:
            self._upper()[...] += other.high
        if other.floating is not None:
            self.floating = other.floating + (0 if self.floating is None else self.floating)

    def value(self) -> NDArray[np.float64]:
        """The sum, rounded once to float64."""
        if self.high is not None:
            self._carry()
        return self._value(0, self._size)

    def _value(self, start: int, stop: int) -> NDArray[np.float64]:
        """The sum from `start` to `stop`; what can be carried has been."""
        total: NDArray[np.float64] = self.low[start:stop].astype(np.float64)
        if self.high is not None:
            upper = self.high[start:stop].astype(np.float64) * float(1 << CARRY_BITS)
            total = upper + self._low[start:stop]
        total *= 2.0**-UNIT_BITS
        return total if self.floating is None else total + self.floating[start:stop]

    def quotient(self, weight: float) -> NDArray[np.float32]:
        """The sum over `weight`, float32, in the sum's own memory: it is used up by this."""
        plain = self.high is None and self.floating is None
        if plain and self._later and self._words is None:
            return self._quotient_of_files(weight)
        low, size = self.low, self._size
        if not plain or not low.flags.owndata:
            return self._quotient_beside(weight)
        self._words = np.zeros(0, np.int64)
        out = low.view(np.float32)
        # A tile is written where only tiles before it were.
        for start in range(0, size, TILE):
            part = low[start : start + TILE].astype(np.float64)
            part *= 2.0**-UNIT_BITS
            part /= weight
            out[start : start + len(part)] = part
        del out
        low.resize((size + 1) // 2, refcheck=False)
        mean: NDArray[np.float32] = low.view(np.float32)[:size]
        return mean

    def _quotient_beside(self, weight: float) -> NDArray[np.float32]:
        """The quotient in memory of its own."""
        if self.high is not None:
            self._carry()
        mean = np.empty(self._size, np.float32)
        with np.errstate(over="ignore"):
            for start, stop in room.pieces(self._size, 8):
                mean[start:stop] = self._value(start, stop) / weight
                room.rest(self._low, start, stop)
        self._words = np.zeros(0, np.int64)
        return mean

    def _quotient_of_files(self, weight: float) -> NDArray[np.float32]:
        """The quotient of what lies in mapped files, of which there is no sum yet."""
        later, self._later = self._later, []
        mean = np.empty(self._size, np.float32)
        words = np.empty(TILE, np.int64)
        for start in range(0, self._size, TILE):
            stop = min(start + TILE, self._size)
            tile = words[: stop - start]
            tile.fill(_signed(-len(later) * MAGIC_BITS))
            _add_files(later, start, stop, tile)
            floats = tile.astype(np.float64)
            floats *= 2.0**-UNIT_BITS
            floats /= weight
            mean[start:stop] = floats
        return mean

    def _settle(self) -> None:
        """Add what waits."""
        if not self._later:
            return
        later, self._later = self._later, []
        # Each of them is below 2^51, so that these few come to less than any bound.
        self._make_room(sum(peak for _, _, peak in later))
        for first, last in room.pieces(self._size, 8):
            for start in range(first, last, TILE):
                stop = min(start + TILE, last)
                _add_files(later, start, stop, self._low[start:stop])
            room.rest(self._low, first, last)
        self._magic += len(later)

    def _add_wide(self, vector: NDArray[Any], scale: float) -> None:
        units = np.rint(vector.astype(np.float64) * scale)
        upper = np.floor(units / float(1 << CARRY_BITS))
        lower = units - upper * float(1 << CARRY_BITS)
        self._make_room(1 << CARRY_BITS)
        words = self._low
        words += lower.astype(np.int64)
        self._upper()[...] += upper.astype(np.int64)

    def _make_room(self, magnitude: int) -> None:
        if self._taken + magnitude >= ROOM:
            self._carry()
        self._taken += magnitude

    def _carry(self) -> None:
        """Move whole multiples of 2^32 units up; leaves 0 <= low < 2^32, which is unique."""
        upper, low = self._upper(), self.low
        for start, stop in room.pieces(self._size, 8):
            upper[start:stop] += low[start:stop] >> CARRY_BITS
            low[start:stop] &= (1 << CARRY_BITS) - 1
        self._taken = 1 << CARRY_BITS

    def _upper(self) -> NDArray[np.int64]:
        if self.high is None:
            self.high = room.zeros(self._size, np.int64)
        return self.high


def _signed(value: int) -> int:
    """A whole number as an int64 holds it: modulo 2^64, as all sums are."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _peak(vector: NDArray[Any]) -> float:
    """The largest magnitude in a vector that is not empty, gone through once."""
    peak = 0.0
    for first, last in room.pieces(len(vector), vector.itemsize):
        for start in range(first, last, TILE):
            part = vector[start : min(start + TILE, last)]
            peak = max(peak, float(part.max()), -float(part.min()))
        room.rest(vector, first, last)
    return peak


def _add_narrow(vector: NDArray[Any], scale: float, total: NDArray[np.int64]) -> None:
    """Add a vector to these words; each of them then exceeds the sum by MAGIC_BITS."""
    # Tiles keep the scratch in the processor's cache.
    scratch = np.empty(min(TILE, len(vector)), np.float64)
    for start in range(0, len(vector), TILE):
        part = vector[start : start + TILE]
        floats = scratch[: len(part)]
        np.multiply(part, scale, out=floats, dtype=np.float64)
        floats += MAGIC
        words = total[start : start + TILE]
        np.add(words, floats.view(np.int64), out=words)


def _add_files(
    vectors: Sequence[tuple[NDArray[Any], float, int]],
    start: int,
    stop: int,
    total: NDArray[np.int64],
) -> None:
    """Add this piece of vectors that lie in files to these words, as `_add_narrow` does."""
    for vector, scale, _ in vectors:
        into = np.empty(stop - start, vector.dtype)
        _add_narrow(room.read(vector, start, stop, into), scale, total)


def unit_scale(weight: float) -> float:
    """What values are multiplied by to be counted in units with this weight."""
    return rounded(weight) * float(1 << UNIT_BITS)


def to_units(value: float) -> int:
    """A number as a whole number of units."""
    return round(value * (1 << UNIT_BITS))


def rounded(value: float) -> float:
    """A number as fixed point holds it."""
    return to_units(value) / (1 << UNIT_BITS)


class ExactScalar:
    """A running sum of Python numbers with the same guarantee; integers of any size."""

    def __init__(self, units: int = 0) -> None:
        self.units = units

    def add(self, value: float) -> None:
        self.units += to_units(value)

    def add_all(self, values: Sequence[float]) -> None:
        """Add many numbers, as if one after the other."""
        units = np.rint(np.array(values, np.float64) * float(1 << UNIT_BITS))
        if np.abs(units).sum() < EXACT:
            self.units += int(units.sum())
        else:
            self.units += sum(to_units(value) for value in values)

    def value(self) -> float:
        return self.units / (1 << UNIT_BITS)
