"""Encoding: columns of a table as one matrix of numbers, the same for its test part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from atoll.data.sources.arrow import (
    INSTALL,
    Array,
    ArrowType,
    Column,
    Missing,
    Table,
    category_values,
    check_columns,
    column_numbers,
    is_category,
    is_numeric,
    missing_error,
    pyarrow_module,
)
from atoll.data.tasks import tell_apart
from atoll.errors import DataError, require

#: A column of more different texts is a name or a sentence rather than a category.
_MOST_CATEGORIES = 1000
#: Text of more different numbers than these, and of few other marks, is a column of numbers.
_FEW_NUMBERS, _MARKS_AMONG_NUMBERS = 10, 0.2
#: Bytes of the output that are filled at a time, so that its rows stay in the cache.
_FILL_BYTES = 1 << 18
_INDICATE = "fill or drop them first, or say missing='indicator'"


def encode_columns(
    table: Table,
    features: Sequence[str],
    *,
    test: Table | None = None,
    missing: Missing = "refuse",
    name: str = "table",
) -> tuple[list[NDArray[np.float32]], tuple[str, ...]]:
    """Inputs float32 [N, F] of a table and, if given, of a test table encoded as the first is.

    And what each of the F inputs is: "age", "sex=f", "age missing", "pixels[3]".

    Raises DataError for missing values, unless `missing="indicator"`, and for types that are
    neither numbers, lists of them, text, categories nor booleans.
    """
    if missing not in get_args(Missing):
        raise DataError(f"{name}: missing must be 'refuse' or 'indicator', not {missing!r}")
    tables = {name: table} if test is None else {name: table, f"{name}, test part": test}
    for part, own in tables.items():
        check_columns(features, own.column_names, part)
        if len(own) == 0:
            raise DataError(f"{part}: there are no examples")
    columns, names = [], []
    for feature in features:
        parts = {part: own[feature] for part, own in tables.items()}
        blocks, kinds = _encoded(parts, feature, missing)
        columns.append(blocks)
        names += [f"{feature}{kind}" for kind in kinds]
    return [_side_by_side(blocks) for blocks in zip(*columns, strict=True)], tuple(names)


def _encoded(
    columns: Mapping[str, Column], feature: str, missing: Missing
) -> tuple[list[Array], list[str]]:
    """A block [N, width] for each part of one column, the training part first, and its names."""
    noun = f"column {feature!r}"
    name, column = next(iter(columns.items()))
    if is_category(column.type):
        fits, encode = is_category, _encoded_categories
    elif is_numeric(column.type):
        fits, encode = is_numeric, _encoded_numbers
    else:
        raise DataError(
            f"{name}: {noun} has type {column.type}, which has no encoding as numbers; turn it "
            "into numbers, text or lists first, or leave it out with features=..."
        )
    for part, own in columns.items():
        if not fits(own.type) and not pyarrow_module().types.is_null(own.type):
            raise DataError(
                f"{part}: {noun} has type {own.type}, but {column.type} in the training part"
            )
    return encode(columns, noun, missing)


def _encoded_numbers(
    columns: Mapping[str, Column], noun: str, missing: Missing
) -> tuple[list[Array], list[str]]:
    parts = [column_numbers(column, noun, name) for name, column in columns.items()]
    train = parts[0]
    for part, name in zip(parts, columns, strict=True):
        if part.shape[1] != train.shape[1]:
            raise DataError(
                f"{name}: {noun} has {part.shape[1]} numbers per row, "
                f"but {train.shape[1]} in the training part"
            )
    holes = [
        _has_holes(part, noun, missing, name) for name, part in zip(columns, parts, strict=True)
    ]
    kinds = [""] if train.shape[1] == 1 else [f"[{place}]" for place in range(train.shape[1])]
    if not any(holes):
        return parts, kinds
    lacking = np.isnan(train)
    if lacking.all(axis=0).any():
        raise DataError(
            f"{next(iter(columns))}: {noun} holds no value to take a mean of; "
            "leave it out with features=..."
        )
    means = np.asarray(np.nanmean(train, axis=0, dtype=np.float64), dtype=np.float32)
    flagged = np.flatnonzero(lacking.any(axis=0))
    kinds += [f"{kinds[place]} missing" for place in flagged]
    return [_filled(part, means, flagged) for part in parts], kinds


def _filled(values: Array, means: Array, flagged: Array) -> Array:
    lacking = np.isnan(values)
    filled = np.where(lacking, means, values.astype(np.float32, copy=False))
    return np.hstack([filled, lacking[:, flagged]])


def _has_holes(values: Array, noun: str, missing: Missing, name: str) -> bool:
    """Whether values are missing, where they may be; DataError for what float32 cannot hold."""
    tell_apart(values, f"{name}: the values of {noun}")
    limit = np.finfo(np.float32).max
    if values.dtype.kind != "f":
        return False
    # One pass over the good case: a comparison with NaN is false.
    small = values.dtype.itemsize <= limit.itemsize
    if (np.isfinite(values) if small else np.abs(values) <= limit).all():
        return False
    holes = int(np.count_nonzero(np.isnan(values)))
    if holes and missing == "refuse":
        raise missing_error(noun, holes, values.size, name, _INDICATE)
    too_large = int(np.count_nonzero(np.isinf(values) if small else np.abs(values) > limit))
    if too_large:
        raise DataError(
            f"{name}: {noun} has {too_large} values that are infinite or too large for float32; "
            "rescale the column or drop these rows"
        )
    return True


def _encoded_categories(
    columns: Mapping[str, Column], noun: str, missing: Missing
) -> tuple[list[Array], list[str]]:
    (name, train), *_ = columns.items()
    wanted = category_values(train).type
    parts = [_categories(own, wanted, noun, missing, part) for part, own in columns.items()]
    present = sorted(parts[0].drop_null().unique().to_pylist())
    if not pyarrow_module().types.is_dictionary(train.type):
        _check_no_numbers(present, parts[0], noun, name)
    if not present:
        raise DataError(f"{name}: {noun} holds no value at all; leave it out with features=...")
    if len(present) > _MOST_CATEGORIES:
        raise DataError(
            f"{name}: {noun} has {len(present)} different values, more than the "
            f"{_MOST_CATEGORIES} categories that become inputs; leave it out with "
            "features=..., or encode it as numbers"
        )
    categories = pyarrow_module().array(present, type=wanted)
    flagged = parts[0].null_count > 0
    kinds = [f"={text}" for text in present] + [" missing"] * flagged
    return [_one_hot(part, categories, flagged=flagged) for part in parts], kinds


def _check_no_numbers(present: Sequence[object], column: Column, noun: str, name: str) -> None:
    """Refuse text that is numbers but for a few marks: each number would become a category."""
    marks = [text for text in present if isinstance(text, str) and not _is_number(text)]
    numbers = len(present) - len(marks)
    if not all(isinstance(text, str) for text in present) or not marks:
        return
    if numbers <= _FEW_NUMBERS or len(marks) > numbers * _MARKS_AMONG_NUMBERS:
        return
    row = column.to_pylist().index(marks[0])
    shown = ", ".join(map(repr, marks[:5])) + (", ..." if len(marks) > 5 else "")
    raise DataError(
        f"{name}: {noun} is text, but {numbers} of its {len(present)} different values are "
        f"numbers; the others are {shown} (first at row {row}). Make it numbers, with nothing "
        "where there is no value (pandas: read_csv(..., na_values=[...])), or a categorical "
        "column if they are names of categories"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _categories(
    column: Column, wanted: ArrowType, noun: str, missing: Missing, name: str
) -> Column:
    """The values of a column, of the wanted type, none missing unless they may be."""
    # A column of which a file holds no value has no type to tell.
    unknown = pyarrow_module().types.is_null(column.type)
    values = column.cast(wanted) if unknown else category_values(column)
    if values.type != wanted:
        raise DataError(
            f"{name}: {noun} holds values of type {values.type}, but {wanted} in the training part"
        )
    if values.null_count and missing == "refuse":
        raise missing_error(noun, values.null_count, len(values), name, _INDICATE)
    return values


def _one_hot(values: Column, categories: Column, flagged: bool) -> Array:
    """Rows [N, K + flagged] of booleans, no category where it is missing or unknown."""
    compute = require("pyarrow.compute", INSTALL, "Reading a table")
    found = compute.index_in(values, value_set=categories)
    codes = found.fill_null(-1).to_numpy(zero_copy_only=False)
    block = np.zeros((len(codes), len(categories) + flagged), dtype=np.bool_)
    rows = np.flatnonzero(codes >= 0)
    block[rows, codes[rows]] = True
    if flagged:
        block[:, -1] = values.is_null().to_numpy(zero_copy_only=False)
    return block


def _side_by_side(blocks: Sequence[Array]) -> NDArray[np.float32]:
    """Blocks [N, width] of any number type as one float32 array [N, sum of widths]."""
    edges = np.cumsum([0, *(block.shape[1] for block in blocks)]).tolist()
    x = np.empty((len(blocks[0]), edges[-1]), dtype=np.float32)
    step = max(64, _FILL_BYTES // (x.itemsize * edges[-1]))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        for block, left, right in zip(blocks, edges, edges[1:], strict=False):
            x[rows, left:right] = block[rows]
    return x
