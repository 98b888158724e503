"""Exact sums: fixed point in integers, so that order, grouping and withdrawal cannot matter.

A value is counted in units of 2^-40 and summed in int64. Before a sum could overflow, its upper
part is carried into a second int64 worth 2^32 units, so values up to 2^38 are summed exactly.
Integer addition is associative: any order, any split over workers and any restart give the same
bits, and subtracting an update restores the sum as if it had never been there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNIT_BITS = 40
CARRY_BITS = 32
#: An int64 stays far from overflow while the magnitudes it has taken in add up to at most this.
ROOM = 1 << 62
#: Values from here on (in units) are summed in floats; below, 100,000 of them fit two words.
LIMIT = float(1 << 78)
TILE = 1 << 15


class FixedSum:
    """The running sum of `weight * vector` for vectors of one size.

    What is too large for fixed point goes to a float64 sum, for which order matters in the last
    bits; `exact` says whether that has happened.
    """

    def __init__(self, size: int) -> None:
        self.low = np.zeros(size, np.int64)
        self.high: NDArray[np.int64] | None = None
        self.floating: NDArray[np.float64] | None = None
        self._taken = 0

    @property
    def exact(self) -> bool:
        return self.floating is None

    def add(self, vector: NDArray[np.floating], weight: float, sign: int = 1) -> None:
        """Add (sign 1) or withdraw (sign -1) `weight * vector`; all values must be finite."""
        if not vector.size:
            return
        scale = weight * float(1 << UNIT_BITS)
        peak = max(float(vector.max()), -float(vector.min())) * scale
        if peak >= LIMIT:
            if self.floating is None:
                self.floating = np.zeros(len(vector))
            self.floating += sign * weight * vector.astype(np.float64)
        elif peak >= ROOM / 4:
            self._add_wide(vector, scale, sign)
        else:
            self._make_room(int(peak) + 1)
            self._add_narrow(vector, scale, sign)

    def merge(self, other: FixedSum) -> None:
        """Add another sum, as if its vectors had been added here."""
        self._make_room(other._taken)
        self.low += other.low
        if other.high is not None:
            self._upper()[...] += other.high
        if other.floating is not None:
            self.floating = other.floating + (0 if self.floating is None else self.floating)

    def value(self) -> NDArray[np.float64]:
        """The sum, rounded once to float64."""
        total: NDArray[np.float64] = self.low.astype(np.float64)
        if self.high is not None:
            self._carry()
            total = self.high.astype(np.float64) * float(1 << CARRY_BITS) + self.low
        total *= 2.0**-UNIT_BITS
        return total if self.floating is None else total + self.floating

    def _add_narrow(self, vector: NDArray[np.floating], scale: float, sign: int) -> None:
        # Tiles keep the float64 and int64 scratch in the processor's cache.
        scratch = np.empty(min(TILE, len(vector)), np.float64)
        units = np.empty(len(scratch), np.int64)
        accumulate = np.add if sign > 0 else np.subtract
        for start in range(0, len(vector), TILE):
            part = vector[start : start + TILE]
            floats, ints = scratch[: len(part)], units[: len(part)]
            np.multiply(part, scale, out=floats, dtype=np.float64)
            np.rint(floats, out=floats)
            ints[...] = floats
            total = self.low[start : start + TILE]
            accumulate(total, ints, out=total)

    def _add_wide(self, vector: NDArray[np.floating], scale: float, sign: int) -> None:
        units = np.rint(vector.astype(np.float64) * scale)
        upper = np.floor(units / float(1 << CARRY_BITS))
        lower = units - upper * float(1 << CARRY_BITS)
        self._make_room(1 << CARRY_BITS)
        self.low += sign * lower.astype(np.int64)
        self._upper()[...] += sign * upper.astype(np.int64)

    def _make_room(self, magnitude: int) -> None:
        if self._taken + magnitude >= ROOM:
            self._carry()
        self._taken += magnitude

    def _carry(self) -> None:
        """Move whole multiples of 2^32 units up; leaves 0 <= low < 2^32, which is unique."""
        upper = self._upper()
        upper += self.low >> CARRY_BITS
        self.low &= (1 << CARRY_BITS) - 1
        self._taken = 1 << CARRY_BITS

    def _upper(self) -> NDArray[np.int64]:
        if self.high is None:
            self.high = np.zeros_like(self.low)
        return self.high


def to_units(value: float) -> int:
    """A number as a whole number of units."""
    return round(value * (1 << UNIT_BITS))


def rounded(value: float) -> float:
    """A number as fixed point holds it."""
    return to_units(value) / (1 << UNIT_BITS)


class ExactScalar:
    """A running sum of Python numbers with the same guarantee; integers of any size."""

    def __init__(self) -> None:
        self.units = 0

    def add(self, value: float, sign: int = 1) -> None:
        self.units += sign * to_units(value)

    def value(self) -> float:
        return self.units / (1 << UNIT_BITS)
