"""Tables: data frames, Arrow streams, CSV and Parquet files as data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np

from atoll.data.arrow import (
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
from atoll.data.dataset import Dataset
from atoll.data.encoding.columns import Amounts, Classes
from atoll.data.encoding.encoding import Encoding, inputs_of
from atoll.data.encoding.kinds import NoValue, chosen, fitted
from atoll.data.encoding.values import plain
from atoll.data.sources.arrays import from_arrays
from atoll.data.tasks import Task
from atoll.errors import DataError


def from_table(
    source: Any,
    *,
    label: str = "",
    features: Sequence[str] | None = None,
    client: str | Sequence[str] | None = None,
    encoding: Encoding | str | PathLike[str] | None = None,
    units: Mapping[str, str] | None = None,
    task: Task | str | None = None,
    classes: int | None = None,
    test: Any = None,
    missing: Missing = "refuse",
    no_value: NoValue = (),
    name: str | None = None,
    class_names: Sequence[str] = (),
) -> Dataset:
    """The rows of a table as a data set with float32 inputs [N, F].

    `source` is a data frame of pandas or polars, a pyarrow table, a DuckDB relation, a Hugging
    Face dataset, anything else with `__arrow_c_stream__`, or the path of a .csv or .parquet
    file.

    With an `encoding` (or the path of one, see `data.agree`) columns, categories and classes are
    found by their names, whatever their order and number in this table, and what does not fit is
    refused; `units` {"chol": "mmol/l"} say what this table's columns are counted in. It decides
    all that `label`, `features`, `missing`, `classes` and `class_names` say otherwise.

    Without one, the table is encoded by itself. Without `features`, every column but `label` and
    `client` is one, in the table's order. A column of numbers becomes one input; a column of lists
    of equal length becomes as many; a text, categorical or boolean column becomes one input per
    category that the table holds, the categories sorted. Missing values (null, NaN or empty text)
    are refused, or with `missing="indicator"` numbers are filled with the mean of their column in
    `source`, categories with zeros, and the column is followed by inputs that are 1 where a value
    was missing. `no_value` are texts or numbers that mean so, in all columns or by column; texts
    such as "NA" are asked about. A text or categorical label gives sorted `class_names`; whole
    labels mean classification, fractional regression.

    `client` names the columns that become natural keys. `test` is another source with the same
    columns, encoded as `source` is; a category that only it holds becomes zeros.

    Raises DataError for unknown columns, missing values and columns that are not numbers.
    """
    name = name or default_name(source)
    table = read_table(source, name)
    held_out = None if test is None else read_table(test, f"{name}, test part")
    clients = (client,) if isinstance(client, str) else tuple(client or ())
    if encoding is not None:
        said = {"label": label, "features": features, "classes": classes,
                "class_names": class_names, "missing": missing != "refuse",
                "no_value": no_value}  # fmt: skip
        beside = [noun for noun, given in said.items() if given]
        if beside:
            raise DataError(f"{name}: an encoding is given, which says what {beside[0]} would say")
        own = encoding if isinstance(encoding, Encoding) else Encoding.load(Path(encoding))
        keys = client_keys(table, clients, name)
        return _encoded(table, held_out, own, keys, task, name, units)
    if not label:
        raise DataError(f"{name}: say which column is the label, label='...'")
    if units:
        raise DataError(f"{name}: units are compared with an encoding's, and none is given")
    if missing not in get_args(Missing):
        raise DataError(f"{name}: missing must be 'refuse' or 'indicator', not {missing!r}")
    features = chosen(table, label, features, clients, name)
    inputs = fitted(table, features, missing, name, no_value)
    target, sorted_names = label_values(table, label, name)
    held = None
    if held_out is not None:
        part = f"{name}, test part"
        test_target, _ = label_values(held_out, label, part)
        held = inputs_of(inputs, held_out, part), test_target
    x = inputs_of(inputs, table, name)
    dataset = from_arrays(
        x,
        target,
        task=task,
        classes=classes,
        keys=client_keys(table, clients, name),
        test=held,
        name=name,
        class_names=tuple(class_names) or sorted_names,
        describe=f"{len(features)} columns of {name} as {x.shape[1]} inputs, label {label!r}",
    )  # fmt: skip
    return dataset.encoded(Encoding(inputs, _label(dataset, target), label))


def _encoded(
    table: Table,
    test: Table | None,
    encoding: Encoding,
    keys: Mapping[str, Array],
    task: Task | str | None,
    name: str,
    units: Mapping[str, str] | None,
) -> Dataset:
    """A table, and its test part, as an encoding says."""
    parts = [(table, name)] + ([(test, f"{name}, test part")] if test is not None else [])
    (x, y), *held_out = [
        (encoding.inputs(each, part, units), encoding.targets(each, part, units))
        for each, part in parts
    ]
    classes = len(encoding.classes) or None
    dataset = from_arrays(
        x,
        y,
        task=task or ("classification" if classes else "regression"),
        classes=classes,
        keys=keys,
        test=held_out[0] if held_out else None,
        name=name,
        class_names=encoding.classes,
        describe=f"{name} as {x.shape[1]} inputs, label {encoding.target!r}",
    )
    return dataset.encoded(encoding)


def _label(dataset: Dataset, target: Array) -> Classes | Amounts:
    """What the label has become, for another table."""
    if not dataset.task.labelled or not dataset.classes:
        return Amounts(width=target.shape[1] if target.ndim > 1 else 1)
    numbers = tuple(str(number) for number in range(dataset.classes))
    texts = ("false", "true") if target.dtype.kind == "b" else numbers
    names = tuple(map(plain, dataset.class_names)) or texts
    same = dict(zip(texts, names, strict=True)) if target.dtype.kind != "O" else {}
    return Classes(values=names, same={one: name for one, name in same.items() if one != name})


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
