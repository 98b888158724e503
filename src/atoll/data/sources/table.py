"""Tables: data frames, Arrow streams, CSV and Parquet files as data sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from atoll.data.dataset import Dataset
from atoll.data.sources.arrays import from_arrays
from atoll.data.sources.arrow import (
    DROP,
    Array,
    Column,
    Missing,
    Table,
    category_values,
    check_columns,
    column_numbers,
    default_name,
    is_category,
    is_list,
    is_numeric,
    is_text,
    missing_error,
    pyarrow_module,
    read_table,
    stored_type,
)
from atoll.data.sources.encoding import encode_columns
from atoll.data.tasks import Task
from atoll.errors import DataError


def from_table(
    source: Any,
    *,
    label: str,
    features: Sequence[str] | None = None,
    client: str | Sequence[str] | None = None,
    task: Task | str | None = None,
    classes: int | None = None,
    test: Any = None,
    missing: Missing = "refuse",
    name: str | None = None,
    class_names: Sequence[str] = (),
) -> Dataset:
    """The rows of a table as a data set with float32 inputs [N, F].

    `source` is a data frame of pandas or polars, a pyarrow table, a DuckDB relation, a Hugging
    Face dataset, anything else with `__arrow_c_stream__`, or the path of a .csv or .parquet
    file. Without `features`, every column but `label` and `client` is one, in the table's order.

    A column of numbers becomes one input; a column of lists of equal length becomes as many; a
    text, categorical or boolean column becomes one input per category that the table holds, the
    categories sorted. Missing values (null or NaN) are refused, or with `missing="indicator"`
    numbers are filled with the mean of their column in `source`, categories with zeros, and the
    column is followed by inputs that are 1 where a value was missing. A text or categorical
    label gives sorted `class_names`; whole labels mean classification, fractional regression.

    `client` names the columns that become natural keys. `test` is another source with the same
    columns, encoded as `source` is; a category that only it holds becomes zeros.

    Raises DataError for unknown columns, missing values and columns that are not numbers.
    """
    name = name or default_name(source)
    table = read_table(source, name)
    held_out = None if test is None else read_table(test, f"{name}, test part")
    clients = (client,) if isinstance(client, str) else tuple(client or ())
    features = _features(table, label, clients, features, name)
    inputs, names = encode_columns(table, features, test=held_out, missing=missing, name=name)
    width = inputs[0].shape[1]
    y, sorted_names = label_values(table, label, name)
    test_y = None if held_out is None else label_values(held_out, label, f"{name}, test part")[0]
    return from_arrays(
        inputs[0],
        y,
        task=task,
        classes=classes,
        keys=client_keys(table, clients, name),
        test=None if test_y is None else (inputs[1], test_y),
        name=name,
        class_names=tuple(class_names) or sorted_names,
        describe=f"{len(features)} columns of {name} as {width} inputs, label {label!r}",
        columns=names,
    )


def _features(
    table: Table,
    label: str,
    clients: Sequence[str],
    features: Sequence[str] | None,
    name: str,
) -> tuple[str, ...]:
    columns = table.column_names
    check_columns((label, *clients), columns, name)
    if features is None:
        others = {label, *clients, *_index_columns(table)}
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


def _index_columns(table: Table) -> list[str]:
    """Columns that hold the index of a pandas frame: usable by name, but no features."""
    metadata = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    return [index for index in metadata.get("index_columns", ()) if isinstance(index, str)]


def label_values(table: Table, label: str, name: str) -> tuple[Array, tuple[str, ...]]:
    """Targets [N] or [N, D] of a table, text as objects, and the sorted names of categories.

    Raises DataError for missing values and for types that are neither numbers nor text.
    """
    check_columns((label,), table.column_names, name)
    types, column, noun = pyarrow_module().types, table[label], f"label column {label!r}"
    values = category_values(column) if is_category(column.type) else column
    if values.null_count:
        raise missing_error(noun, values.null_count, len(column), name, DROP)
    if types.is_boolean(column.type):
        return column.to_numpy(zero_copy_only=False), ()
    if is_category(column.type):
        names = sorted(values.unique().to_pylist()) if types.is_dictionary(column.type) else ()
        texts = [str(value) for value in values.to_pylist()]
        return np.array(texts, dtype=object), tuple(str(value) for value in names)
    if not is_numeric(column.type):
        raise DataError(f"{name}: {noun} has type {column.type}; give numbers, or text for classes")
    targets = column_numbers(column, noun, name)
    holes = int(np.count_nonzero(np.isnan(targets)))
    if holes:
        raise missing_error(noun, holes, targets.size, name, DROP)
    return (targets if is_list(stored_type(column.type)) else targets[:, 0]), ()


def client_keys(table: Table, clients: Sequence[str], name: str) -> dict[str, Array]:
    """Natural keys {column: owners [N]}: whole numbers, or text for any other kind of name."""
    check_columns(clients, table.column_names, name)
    return {client: _owners(table[client], client, name) for client in clients}


def _owners(column: Column, client: str, name: str) -> Array:
    noun = f"client column {client!r}"
    arrow, types = pyarrow_module(), pyarrow_module().types
    values = category_values(column) if is_category(column.type) else column
    if values.null_count:
        advice = "every row needs an owner"
        raise missing_error(noun, values.null_count, len(column), name, advice)
    if types.is_integer(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    if not (is_text(values.type) or types.is_boolean(values.type) or types.is_date(values.type)):
        raise DataError(
            f"{name}: {noun} has type {column.type}, but owners are named by text, dates or "
            "whole numbers; turn it into text first"
        )
    coded = values.cast(arrow.large_string()).combine_chunks().dictionary_encode()
    names = np.array(coded.dictionary.to_pylist(), dtype=np.str_)
    return np.asarray(names[coded.indices.to_numpy(zero_copy_only=False)])
