"""Kinds of columns: what each becomes as inputs of a model, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atoll.data.arrow import DROP, Array, missing_error
from atoll.data.encoding.values import coded, numbers
from atoll.errors import DataError, shown

logger = logging.getLogger("atoll.data")

FILL_FIRST = "fill or drop them first, or say missing='indicator'"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Args:
        called: what else it is called.
        no_value: texts or numbers that mean that there is no value.
    """

    kind: ClassVar[str]

    called: tuple[str, ...] = ()
    no_value: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counted(Column):
    """Numbers, or lists of so many.

    Args:
        width: numbers per row.
        unit: what they are counted in, where that is said.
        units: other units, and by what their values are multiplied to be in this one.
    """

    width: int = 1
    unit: str = ""
    units: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(np.isfinite(factor) and factor > 0 for factor in self.units.values()):
            raise DataError(f"units are numbers above 0 to multiply by, not {dict(self.units)}")
        if self.units and not (self.unit and all(self.units)):
            raise DataError("where there are other units, each has a name, this column's own too")

    def numbers_of(self, values: Any, noun: str, name: str, unit: str) -> Array:
        """Numbers [N, width] of a table's column in this one's unit, NaN where there is none."""
        found = numbers(values, noun, name, self.no_value)
        if found.shape[1] != self.width:
            raise DataError(
                f"{name}: {noun} has {found.shape[1]} numbers per row, but {self.width} in the "
                "encoding"
            )
        factor = self._factor(unit, noun, name)
        return found if factor == 1 else found * factor

    def _factor(self, unit: str, noun: str, name: str) -> float:
        if not unit and self.units:
            raise DataError(
                f"{name}: {noun} may be in {' or '.join(map(repr, [self.unit, *self.units]))}: say "
                f"which, with units={{...}} or in the column's name, as in '... [{self.unit}]'"
            )
        if not unit or unit == self.unit:
            return 1.0
        if unit not in self.units:
            told = f"in {self.unit!r}" if self.unit else "without a unit"
            raise DataError(
                f"{name}: {noun} is in {unit!r}, but {told} in the encoding, which knows no "
                "factor; convert it first"
            )
        return self.units[unit]


@dataclass(frozen=True, kw_only=True)
class Worded(Column):
    """Texts that are each one of some values.

    Args:
        values: the values, as texts.
        same: other spellings, and the values that they are.
    """

    values: tuple[str, ...]
    same: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) < len(self.values):
            raise DataError("values are different texts, with at least one of them")
        for spelling, value in self.same.items():
            if value not in self.values or spelling in self.values:
                raise DataError(
                    f"{spelling!r} cannot be another spelling of {value!r}; the values are "
                    f"{shown(self.values)}"
                )

    def places_of(
        self, values: Any, noun: str, name: str, unit: str, *, strict: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each row's value [N] stands among the values, -1 for none, and which have none."""
        if unit:
            raise DataError(f"{name}: {noun} has unit {unit!r}, but is {self.kind} in the encoding")
        found = coded(values, noun, name, self.no_value)
        place = {text: number for number, text in enumerate(self.values)}
        place |= {text: place[value] for text, value in self.same.items()}
        odd = [text for text in found.texts if text not in place]
        if odd and strict:
            held = found.counts()
            near = get_close_matches(odd[0].lower(), {v.lower(): v for v in self.values}, 1)
            close = next((v for v in self.values if near and v.lower() == near[0]), "")
            raise DataError(
                f"{name}: {noun} holds {shown(odd)} ({held[odd[0]]} times {odd[0]!r}, first at row "
                f"{found.first(odd[0])}), which the encoding does not know; it knows "
                f"{shown(self.values)}" + (f": is it {close!r}?" if close else "")
            )
        if odd:
            held = found.counts()
            rows = sum(held[text] for text in odd)
            logger.warning(
                "%s: %s holds %s in %d rows, which the encoding does not know: all zeros there",
                name, noun, shown(odd), rows,
            )  # fmt: skip
        moved = np.array([*(place.get(text, -1) for text in found.texts), -1], np.int64)
        return moved[found.codes], found.codes < 0


@dataclass(frozen=True, kw_only=True)
class Numbers(Counted):
    """A column of numbers, or of lists of so many, each of which is an input.

    Args:
        centre, spread: [width], inputs are (value - centre) / spread; empty leaves them alone.
        fill: [width], what stands where there is no value; empty refuses gaps.
        flagged: places followed, after all, by an input that is 1 where there was no value.
    """

    kind = "numbers"

    centre: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    fill: tuple[float, ...] = ()
    flagged: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("centre", "spread", "fill"):
            told = getattr(self, name)
            if told and (len(told) != self.width or not np.isfinite(told).all()):
                raise DataError(f"{name} must be {self.width} finite numbers, not {told}")
        if len(self.centre) != len(self.spread) or not all(each > 0 for each in self.spread):
            raise DataError("centre and spread go together, and a spread is above 0")
        if not all(0 <= place < self.width for place in self.flagged):
            raise DataError(f"flagged are places from 0 to {self.width - 1}, not {self.flagged}")
        if self.flagged and not self.fill:
            raise DataError("what is flagged where there is no value has a fill")

    def names(self, column: str) -> list[str]:
        """What each input is."""
        places = [column] if self.width == 1 else [f"{column}[{i}]" for i in range(self.width)]
        return places + [f"{places[place]} missing" for place in self.flagged]

    def block(self, values: Any, noun: str, name: str, unit: str = "") -> Array:
        """Inputs [N, width + flagged] of a table's column."""
        found = self._scaled(self.numbers_of(values, noun, name, unit))
        lacking = np.isnan(found) if found.dtype.kind == "f" else np.zeros(found.shape, np.bool_)
        if not lacking.any():
            return np.hstack([found, lacking[:, list(self.flagged)]]) if self.flagged else found
        if not self.fill:
            raise missing_error(noun, int(lacking.sum()), found.size, name, FILL_FIRST)
        fill = np.asarray(self._scaled(np.array(self.fill)), np.float32)
        filled = np.where(lacking, fill, found.astype(np.float32, copy=False))
        return np.hstack([filled, lacking[:, list(self.flagged)]])

    def _scaled(self, values: Array) -> Array:
        if not self.centre:
            return values
        scaled: Array = (values - np.array(self.centre)) / np.array(self.spread)
        return scaled


@dataclass(frozen=True, kw_only=True)
class Categories(Worded):
    """A column of categories, each of which is an input that is 1 where it holds.

    Args:
        unknown: what becomes of other values: "refuse", or "zeros" in all inputs.
        missing: what becomes of rows without a value: "refuse", "zeros", or "indicator", which
            adds an input that is 1 there.
    """

    kind = "categories"

    unknown: str = "refuse"
    missing: str = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unknown not in ("refuse", "zeros"):
            raise DataError(f"unknown is 'refuse' or 'zeros', not {self.unknown!r}")
        if self.missing not in ("refuse", "zeros", "indicator"):
            raise DataError(f"missing is 'refuse', 'zeros' or 'indicator', not {self.missing!r}")

    @property
    def width(self) -> int:
        return len(self.values)

    def names(self, column: str) -> list[str]:
        """What each input is."""
        told = [f"{column}={text}" for text in self.values]
        return told + [f"{column} missing"] * (self.missing == "indicator")

    def block(self, values: Any, noun: str, name: str, unit: str = "") -> NDArray[np.bool_]:
        """Inputs [N, categories, and one more if gaps are flagged] of a table's column."""
        strict = self.unknown == "refuse"
        codes, missing = self.places_of(values, noun, name, unit, strict=strict)
        if missing.any() and self.missing == "refuse":
            raise missing_error(noun, int(missing.sum()), len(codes), name, FILL_FIRST)
        flagged = self.missing == "indicator"
        block = np.zeros((len(codes), len(self.values) + flagged), np.bool_)
        rows = np.flatnonzero(codes >= 0)
        block[rows, codes[rows]] = True
        if flagged:
            block[:, -1] = missing
        return block


@dataclass(frozen=True, kw_only=True)
class Classes(Worded):
    """A label that is one of some classes, in the order of their numbers."""

    kind = "classes"

    def targets(self, values: Any, noun: str, name: str, unit: str = "") -> NDArray[np.int64]:
        """Labels [N] of a table's column."""
        codes, missing = self.places_of(values, noun, name, unit, strict=True)
        if missing.any():
            raise missing_error(noun, int(missing.sum()), len(codes), name, DROP)
        return codes


@dataclass(frozen=True, kw_only=True)
class Amounts(Counted):
    """A label that is an amount, or a list of so many."""

    kind = "amounts"

    def targets(self, values: Any, noun: str, name: str, unit: str = "") -> Array:
        """Amounts [N] or [N, width] of a table's column."""
        found = self.numbers_of(values, noun, name, unit)
        holes = int(np.count_nonzero(np.isnan(found))) if found.dtype.kind == "f" else 0
        if holes:
            raise missing_error(noun, holes, found.size, name, DROP)
        return found[:, 0] if self.width == 1 else found
