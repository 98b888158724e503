"""What a table's columns are: which become inputs, and whether as numbers or as categories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from atoll.data.arrow import (
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
    shown,
)
from atoll.errors import DataError

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


def categories(column: Any, noun: str, name: str, no_value: Sequence[str] = ()) -> Coded | None:
    """The categories of a column of text, categories or booleans; None if it is numbers.

    Raises DataError for what is neither, for more categories than become inputs, and for text that
    is numbers but for a few marks.
    """
    kind = column.type
    if is_category(kind):
        found = coded(column, noun, name, no_value)
        if _is_text_of_numbers(column, found, noun, name, no_value):
            return None
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
    table: Any, features: Sequence[str], missing: Missing, name: str
) -> dict[str, Numbers | Categories]:
    """What the columns of one table become by themselves, in this order."""
    if len(table) == 0:
        raise DataError(f"{name}: there are no examples")
    return {feature: _fitted(table[feature], f"column {feature!r}", missing, name)
            for feature in features}  # fmt: skip


def _fitted(column: Any, noun: str, missing: Missing, name: str) -> Numbers | Categories:
    found = categories(column, noun, name)
    if found is not None:
        gaps = "indicator" if found.missing else "zeros"
        return Categories(
            values=in_order(found.texts), unknown="zeros",
            missing=gaps if missing == "indicator" else "refuse",
        )  # fmt: skip
    if missing == "refuse":
        first = column.drop_null().slice(0, 1) if is_list(stored_type(column.type)) else None
        return Numbers(width=numbers(first, noun, name).shape[1] if first else 1)
    values = numbers(column, noun, name)
    lacking = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, np.bool_)
    if lacking.all(axis=0).any():
        raise DataError(
            f"{name}: {noun} holds no value to take a mean of; leave it out with features=..."
        )
    mean = np.atleast_1d(np.nanmean(values, axis=0, dtype=np.float64))
    flagged = np.flatnonzero(lacking.any(axis=0))
    return Numbers(
        width=values.shape[1], fill=tuple(mean.tolist()), flagged=tuple(flagged.tolist())
    )
