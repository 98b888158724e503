"""What a table's columns are: which become inputs, and whether as numbers or as categories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atoll.data.arrow import (
    Array,
    Missing,
    check_columns,
    is_category,
    is_list,
    is_numeric,
    is_text,
    stored_type,
)
from atoll.data.encoding.columns import Categories, Numbers
from atoll.data.encoding.values import (
    MOST_CATEGORIES,
    Coded,
    coded,
    in_order,
    is_number,
    numbers,
    plain,
)
from atoll.errors import DataError, shown

#: What most programs write for no value, in small letters.
MARKS = frozenset({"na", "n/a", "#n/a", "nan", "null", "none", "missing", "?", "."})
#: Numbers that often stand for no value, and how many others it takes to see that they stand apart.
CODES = (-1, -9, -99, -999, -9999, 99, 999, 9999, 99999)
MANY = 20
NoValue = Sequence[str] | Mapping[str, Sequence[str]]
#: Text of more different numbers than these, and of few other marks, is a column of numbers.
_FEW_NUMBERS, _MARKS_AMONG_NUMBERS = 10, 0.2


def chosen(
    table: Any,
    label: str,
    features: Sequence[str] | None,
    leave_out: Sequence[str],
    name: str,
) -> tuple[str, ...]:
    """The columns that become inputs: those said, or all but the label and what is left out."""
    columns = table.column_names
    check_columns((label, *leave_out), columns, name)
    if features is None:
        check_columns(columns, columns, name)
        others = {label, *leave_out, *_index_columns(table)}
        features = tuple(column for column in columns if column not in others)
        if "" in features:
            raise DataError(
                f"{name}: a column has no name, as when pandas writes its row numbers to CSV; "
                "write with index=False, or say which columns to use with features=..."
            )
    features = (features,) if isinstance(features, str) else tuple(features)
    check_columns(features, columns, name)
    if label in features:
        raise DataError(f"{name}: the label {label!r} is among the features; take it out")
    if not features:
        raise DataError(f"{name}: there is no column but the label and the clients to learn from")
    return features


def _index_columns(table: Any) -> list[str]:
    """Columns that hold the index of a pandas frame: usable by name, but no features."""
    metadata = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    return [index for index in metadata.get("index_columns", ()) if isinstance(index, str)]


def said_of(no_value: NoValue, columns: Sequence[str], name: str) -> dict[str, tuple[str, ...]]:
    """What means no value, by column, where anything is said of it: "*" is said of all.

    Raises DataError for columns that are not there, and for a text where texts are wanted.
    """
    given = no_value if isinstance(no_value, Mapping) else {"*": no_value}
    for column, codes in given.items():
        if isinstance(codes, str):
            raise DataError(f"{name}: no_value takes texts, as in ['{codes}'], and not one text")
        if column not in ("*", *columns):
            raise DataError(f"{name}: no_value is said of {column!r}, which is no column")
    everywhere = tuple(plain(code) for code in given.get("*", ()))
    return {
        column: (*everywhere, *(plain(code) for code in given.get(column, ())))
        for column in columns
        if column in given or everywhere
    }


def _check_marks(found: Coded, noun: str, name: str, column: str, decided: bool) -> None:
    """Ask about texts that most programs write for no value."""
    marks = [text for text in found.texts if text.casefold() in MARKS]
    if marks and not decided:
        raise DataError(
            f"{name}: {noun} holds {shown(marks)} (first at row {found.first(marks[0])}): if that "
            f"means no value, no_value={{{column!r}: {marks}}}; if it is a category, no_value="
            f"{{{column!r}: []}}"
        )


def check_codes(values: Array, noun: str, name: str, column: str) -> None:
    """Ask about numbers that stand apart from all others as codes for no value do: -9, 999."""
    for code in CODES:
        here = values == code
        others = values[~here & ~np.isnan(values)] if here.any() else values[:0]
        if len(others) < MANY:
            continue
        low, high = float(others.min()), float(others.max())
        margin = (high - low) / 2
        if code < low - margin or code > high + margin:
            raise DataError(
                f"{name}: {noun} holds {code} in {int(here.sum())} rows, far from all others "
                f"({low:g} to {high:g}): if that means no value, no_value={{{column!r}: "
                f"['{code}']}}; if it is right, no_value={{{column!r}: []}}"
            )


def categories(
    column: Any, noun: str, name: str, no_value: Sequence[str] | None = None, title: str = ""
) -> Coded | None:
    """The categories of a column of text, categories or booleans; None if it is numbers.

    Raises DataError for what is neither, for more categories than become inputs, and for text that
    is numbers but for a few marks. `no_value` is None where nothing is said of it: then texts such
    as "NA" are asked about.
    """
    kind = column.type
    if is_category(kind):
        found = coded(column, noun, name, no_value or ())
        if _is_text_of_numbers(column, found, noun, name, no_value or ()):
            return None
        if is_text(kind):
            _check_marks(found, noun, name, title, no_value is not None)
        if not found.texts:
            raise DataError(f"{name}: {noun} holds no value at all; leave it out with features=...")
        if len(found.texts) > MOST_CATEGORIES:
            raise DataError(
                f"{name}: {noun} has {len(found.texts)} different values, more than the "
                f"{MOST_CATEGORIES} categories that become inputs; leave it out with "
                "features=..., or encode it as numbers"
            )
        return found
    if not is_numeric(kind):
        raise DataError(
            f"{name}: {noun} has type {kind}, which has no encoding as numbers; turn it into "
            "numbers, text or lists first, or leave it out with features=..."
        )
    return None


def _is_text_of_numbers(
    column: Any, found: Coded, noun: str, name: str, no_value: Sequence[str]
) -> bool:
    """Whether text is numbers but for what means no value; refused if it is but for other marks."""
    if not is_text(column.type):
        return False
    marks: list[tuple[str, int]] = [("", found.blank)] if found.blank >= 0 else []
    marks += [(text, found.first(text)) for text in found.texts if not is_number(text)]
    different = len(found.texts) + (found.blank >= 0)
    count = different - len(marks)
    if count <= _FEW_NUMBERS or len(marks) > count * _MARKS_AMONG_NUMBERS:
        return False
    if not marks:
        return bool(no_value)
    raise DataError(
        f"{name}: {noun} is text, but {count} of its {different} different values are numbers; the "
        f"others are {shown([text for text, _ in marks])} (first at row {marks[0][1]}). Make it "
        "numbers, with nothing where there is no value (pandas: read_csv(..., na_values=[...])), "
        "or a categorical column if they are names of categories"
    )


def fitted(
    table: Any, features: Sequence[str], missing: Missing, name: str, no_value: NoValue = ()
) -> dict[str, Numbers | Categories]:
    """What the columns of one table become by themselves, in this order."""
    if len(table) == 0:
        raise DataError(f"{name}: there are no examples")
    said = said_of(no_value, features, name)
    return {
        feature: _fitted(table[feature], feature, missing, name, said.get(feature))
        for feature in features
    }


def _fitted(
    column: Any, title: str, missing: Missing, name: str, said: tuple[str, ...] | None
) -> Numbers | Categories:
    noun, codes = f"column {title!r}", said or ()
    found = categories(column, noun, name, said, title)
    if found is not None:
        gaps = "indicator" if found.missing else "zeros"
        return Categories(
            values=in_order(found.texts), unknown="zeros",
            missing=gaps if missing == "indicator" else "refuse", no_value=codes,
        )  # fmt: skip
    if missing == "refuse":
        first = column.drop_null().slice(0, 1) if is_list(stored_type(column.type)) else None
        return Numbers(width=numbers(first, noun, name).shape[1] if first else 1, no_value=codes)
    values = numbers(column, noun, name, codes)
    lacking = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, np.bool_)
    if lacking.all(axis=0).any():
        raise DataError(
            f"{name}: {noun} holds no value to take a mean of; leave it out with features=..."
        )
    mean = np.atleast_1d(np.nanmean(values, axis=0, dtype=np.float64))
    flagged = np.flatnonzero(lacking.any(axis=0))
    return Numbers(
        width=values.shape[1],
        fill=tuple(mean.tolist()),
        flagged=tuple(flagged.tolist()),
        no_value=codes,
    )
