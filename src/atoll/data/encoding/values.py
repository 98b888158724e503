"""Values of a column as texts or numbers, whatever type a site's file gives them."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.arrow import (
    Array,
    Column,
    category_values,
    column_numbers,
    is_category,
    is_numeric,
    is_text,
    pyarrow_module,
)
from atoll.data.tasks import tell_apart
from atoll.errors import DataError, shown

#: A column of more different texts is a name or a sentence rather than a category.
MOST_CATEGORIES = 1000
#: What at the end or beginning of a text changes its meaning.
SIGNS = "+-<>=≤≥"


def plain(value: Any) -> str:
    """The one text of a category: composed (NFC), no blanks around it, whole numbers as such.

    Texts that look the same to people are the same here.
    """
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()


def in_order(texts: Collection[str]) -> tuple[str, ...]:
    """Texts sorted: as numbers if they all are whole ones, by their letters otherwise."""
    whole = all(text.lstrip("-").isdecimal() and text.isascii() for text in texts)
    return tuple(sorted(texts, key=(lambda text: (int(text), text)) if whole else str))


def coded(column: Column, noun: str, name: str, no_value: Sequence[str] = ()) -> Coded:
    """A column as codes [N] into its different texts, -1 where there is no value.

    An empty text and those of `no_value` are no value. Raises DataError for types that have no
    text of their own: lists, fractions, dates.
    """
    arrow, kind = pyarrow_module(), column.type
    if arrow.types.is_null(kind):
        return Coded(np.full(len(column), -1, np.int64), ())
    if not (is_category(kind) or arrow.types.is_integer(kind) or arrow.types.is_floating(kind)):
        raise DataError(
            f"{name}: {noun} has type {kind}, but categories are text, booleans or whole numbers"
        )
    values = category_values(column) if is_category(kind) else column
    # An index has one chunk in older versions of pyarrow only if the values have.
    values = values.combine_chunks() if hasattr(values, "combine_chunks") else values
    found = values.dictionary_encode(null_encoding="mask")
    if hasattr(found, "combine_chunks"):
        found = found.combine_chunks()
    codes = np.asarray(found.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    given = found.dictionary.to_pylist()
    fractions = [each for each in given if isinstance(each, float) and not _whole(each)]
    if fractions:
        raise DataError(
            f"{name}: {noun} holds fractions ({shown(fractions)}), which are no categories"
        )
    codes_of_none = {float(text) for text in no_value if is_number(text)}
    absent = {"", *no_value}
    texts = ["" if each != each else plain(each) for each in given]  # noqa: PLR0124
    different = [
        text
        for text in dict.fromkeys(texts)
        if text not in absent and not (is_number(text) and float(text) in codes_of_none)
    ]
    place = {text: number for number, text in enumerate(different)}
    # The last place answers the code -1.
    moved = np.array([*(place.get(text, -1) for text in texts), -1], np.int64)
    empty = next((code for code, each in enumerate(given) if each == ""), None)
    blank = -1 if empty is None else int(np.argmax(codes == empty))
    return Coded(moved[codes], tuple(different), blank)


def _whole(value: float) -> bool:
    return value != value or value.is_integer()  # noqa: PLR0124


class Coded:
    """Codes [N] into texts; -1 is no value. `blank` is the first row of an empty text, or -1."""

    def __init__(self, codes: NDArray[np.int64], texts: tuple[str, ...], blank: int = -1) -> None:
        self.codes, self.texts, self.blank = codes, texts, blank

    @property
    def missing(self) -> int:
        return int(np.count_nonzero(self.codes < 0))

    def first(self, text: str) -> int:
        """The first row that holds a text."""
        return int(np.argmax(self.codes == self.texts.index(text)))

    def counts(self) -> dict[str, int]:
        """How often each text is there."""
        held = self.codes[self.codes >= 0]
        found = np.bincount(held, minlength=len(self.texts)).tolist()
        return dict(zip(self.texts, found, strict=True))


def numbers(column: Column, noun: str, name: str, no_value: Sequence[str] = ()) -> Array:
    """Numbers [N, D] of a column of numbers, lists of them, booleans or text that is numbers.

    NaN is no value, and so are the numbers or texts of `no_value`. Raises DataError for text that
    is no number, other types, and what float32 cannot hold.
    """
    types = pyarrow_module().types
    values: Array
    if is_text(column.type) or (types.is_dictionary(column.type) and is_category(column.type)):
        values = _read(coded(column, noun, name, no_value), noun, name)[:, np.newaxis]
    elif types.is_boolean(column.type):
        values = column_numbers(column.cast("uint8"), noun, name)
    elif is_numeric(column.type):
        values = column_numbers(column, noun, name)
    else:
        raise DataError(
            f"{name}: {noun} has type {column.type}, which has no encoding as numbers; turn it "
            "into numbers, text or lists first, or leave it out with features=..."
        )
    codes = [float(text) for text in no_value if is_number(text)]
    if codes:
        kind = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
        values = np.where(np.isin(values, np.array(codes, kind)), np.nan, values)
    _check_size(values, noun, name)
    return values


def _read(found: Coded, noun: str, name: str) -> Array:
    odd = [text for text in found.texts if not is_number(text)]
    if odd:
        separated = any("," in text and is_number(text.replace(",", "")) for text in odd)
        advice = (
            "write numbers without separators, 1234.5"
            if separated
            else "if that means no value, say so with no_value=[...]"
        )
        raise DataError(
            f"{name}: {noun} is to be numbers, but holds {shown(odd)} (first at row "
            f"{found.first(odd[0])}); {advice}"
        )
    return np.array([*(float(text) for text in found.texts), np.nan])[found.codes]


def letters(text: str) -> str:
    """What of a text tells it apart from another: its number, or its letters and digits.

    Their case and marks between them do not; signs at either end, as of blood types, do.
    """
    if is_number(text):
        return repr(float(text) + 0.0)
    bare = unicodedata.normalize("NFKD", text).casefold()
    ends = {0, len(bare) - 1}
    kept = (c for i, c in enumerate(bare) if c.isalnum() or (c in SIGNS and i in ends))
    return "".join(kept) or text


def is_number(text: str) -> bool:
    """Whether a text is a number; "nan" is none."""
    try:
        return float(text) == float(text) and "_" not in text
    except ValueError:
        return False


def _check_size(values: Array, noun: str, name: str) -> None:
    tell_apart(values, f"{name}: the values of {noun}")
    limit = np.finfo(np.float32).max
    if values.dtype.kind != "f":
        return
    # One pass over the good case: a comparison with NaN is false.
    small = values.dtype.itemsize <= limit.itemsize
    if (np.isfinite(values) if small else np.abs(values) <= limit).all():
        return
    too_large = int(np.count_nonzero(np.isinf(values) if small else np.abs(values) > limit))
    if too_large:
        raise DataError(
            f"{name}: {noun} has {too_large} values that are infinite or too large for float32; "
            "rescale the column or drop these rows"
        )
