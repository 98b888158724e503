"""Tables: data frames, Arrow streams, CSV and Parquet files, encoded as numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.examples import Task
from atoll.data.sources.arrays import from_arrays
from atoll.errors import DataError, require

Array = NDArray[Any]
#: pyarrow's `Table`, `ChunkedArray` or `Array`, and `DataType`; it is imported only where used.
Table = Any
Column = Any
ArrowType = Any
Missing = Literal["refuse", "indicator"]

#: The first pyarrow that casts the text columns of polars.
_INSTALL = "pyarrow>=18"
#: A column of more different texts is a name or a sentence rather than a category.
_MOST_CATEGORIES = 1000
#: Bytes of the output that are filled at a time, so that its rows stay in the cache.
_FILL_BYTES = 1 << 18


def from_table(
    source: Any,
    *,
    label: str,
    features: Sequence[str] | None = None,
    client: str | Sequence[str] | None = None,
    task: Task | None = None,
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
    name = name or _default_name(source)
    table = read_table(source, name)
    held_out = None if test is None else read_table(test, f"{name}, test part")
    clients = (client,) if isinstance(client, str) else tuple(client or ())
    features = _features(table, label, clients, features, name)
    inputs = encode_columns(table, features, test=held_out, missing=missing, name=name)
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
    )


# Reading ------------------------------------------------------------------------------------


def read_table(source: Any, name: str) -> Table:
    """The `pyarrow.Table` of a source that `from_table` takes; DataError for any other."""
    arrow = _pyarrow()
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source), name)
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        return _read_huggingface(source, name)
    if not hasattr(source, "__arrow_c_stream__"):
        collect = "; collect it first" if hasattr(source, "collect") else ""
        raise DataError(
            f"{name}: from_table takes a data frame, anything else with __arrow_c_stream__, or "
            f"the path of a .csv or .parquet file, not {type(source).__name__!r}{collect}"
        )
    try:
        return arrow.table(source)
    except (arrow.ArrowException, TypeError) as error:
        raise DataError(
            f"{name}: this {type(source).__name__} does not read as a table: {error}"
        ) from error


def check_columns(wanted: Sequence[str], columns: Sequence[str], name: str) -> None:
    """Raise DataError for the first wanted column that is not there exactly once."""
    for column in wanted:
        if column not in columns:
            raise DataError(f"{name}: there is no column {column!r}; {_choice(column, columns)}")
        if list(columns).count(column) > 1:
            raise DataError(f"{name}: there are several columns {column!r}; rename all but one")


def _choice(column: str, columns: Sequence[str]) -> str:
    near = {known.lower(): known for known in columns}
    close = [near[known] for known in get_close_matches(str(column).lower(), near)]
    if close:
        return f"close names are {', '.join(map(repr, close))}"
    shown = ", ".join(map(repr, columns[:10])) + (", ..." if len(columns) > 10 else "")
    return f"the columns are {shown}"


def _pyarrow() -> ModuleType:
    return require("pyarrow", _INSTALL, "Reading a table")


def _default_name(source: Any) -> str:
    return Path(source).stem if isinstance(source, str | os.PathLike) else "table"


def _read_file(path: Path, name: str) -> Table:
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{name}: from_table reads .csv and .parquet files, not {path.name!r}; "
            "read it with a data frame library and give the frame"
        )
    if not path.is_file():
        raise DataError(f"{name}: there is no file {str(path)!r}")
    try:
        return reader(path)
    except (_pyarrow().ArrowException, OSError) as error:
        raise DataError(f"{name}: {path.name!r} cannot be read: {error}") from error


def _read_csv(path: Path) -> Table:
    csv = require("pyarrow.csv", _INSTALL, "Reading a table")
    # An empty field is a missing value in a text column too; "" in quotes is an empty text.
    convert = csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    return csv.read_csv(path, convert_options=convert)


def _read_parquet(path: Path) -> Table:
    parquet = require("pyarrow.parquet", _INSTALL, "Reading a table")
    # Folders named key=value would otherwise add columns that the file does not have.
    return parquet.read_table(path, partitioning=None)


def _read_huggingface(source: Any, name: str) -> Table:
    if isinstance(source, Mapping):
        splits = ", ".join(map(repr, source))
        raise DataError(
            f"{name}: from_table takes one split of {splits}; from_huggingface takes them all"
        )
    if not hasattr(source, "__len__"):
        raise DataError(f"{name}: a streamed dataset has no length; load it with streaming=False")
    # Through the format, not `.data`, which knows nothing of select() and shuffle().
    return source.with_format("arrow")[:]


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


# Labels and keys ----------------------------------------------------------------------------


def label_values(table: Table, label: str, name: str) -> tuple[Array, tuple[str, ...]]:
    """Targets [N] or [N, D] of a table, text as objects, and the sorted names of categories.

    Raises DataError for missing values and for types that are neither numbers nor text.
    """
    check_columns((label,), table.column_names, name)
    types, column, noun = _pyarrow().types, table[label], f"label column {label!r}"
    values = _category_values(column) if _is_category(column.type) else column
    if values.null_count:
        raise _missing(noun, values.null_count, len(column), name, _DROP)
    if types.is_boolean(column.type):
        return column.to_numpy(zero_copy_only=False), ()
    if _is_category(column.type):
        names = sorted(values.unique().to_pylist()) if types.is_dictionary(column.type) else ()
        texts = [str(value) for value in values.to_pylist()]
        return np.array(texts, dtype=object), tuple(str(value) for value in names)
    if not _is_numeric(column.type):
        raise DataError(f"{name}: {noun} has type {column.type}; give numbers, or text for classes")
    targets = _numbers(column, noun, name)
    holes = int(np.count_nonzero(np.isnan(targets)))
    if holes:
        raise _missing(noun, holes, targets.size, name, _DROP)
    return (targets if _is_list(_stored_type(column.type)) else targets[:, 0]), ()


def client_keys(table: Table, clients: Sequence[str], name: str) -> dict[str, Array]:
    """Natural keys {column: owners [N]}: whole numbers, or text for any other kind of name."""
    check_columns(clients, table.column_names, name)
    return {client: _owners(table[client], client, name) for client in clients}


def _owners(column: Column, client: str, name: str) -> Array:
    noun = f"client column {client!r}"
    arrow, types = _pyarrow(), _pyarrow().types
    values = _category_values(column) if _is_category(column.type) else column
    if values.null_count:
        advice = "every row needs an owner"
        raise _missing(noun, values.null_count, len(column), name, advice)
    if types.is_integer(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    if not (_is_text(values.type) or types.is_boolean(values.type) or types.is_date(values.type)):
        raise DataError(
            f"{name}: {noun} has type {column.type}, but owners are named by text, dates or "
            "whole numbers; turn it into text first"
        )
    coded = values.cast(arrow.large_string()).combine_chunks().dictionary_encode()
    names = np.array(coded.dictionary.to_pylist(), dtype=np.str_)
    return np.asarray(names[coded.indices.to_numpy(zero_copy_only=False)])


# Features -----------------------------------------------------------------------------------


def encode_columns(
    table: Table,
    features: Sequence[str],
    *,
    test: Table | None = None,
    missing: Missing = "refuse",
    name: str = "table",
) -> list[NDArray[np.float32]]:
    """Inputs float32 [N, F] of a table and, if given, of a test table encoded as the first is.

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
    columns = (
        _encoded({part: own[feature] for part, own in tables.items()}, feature, missing)
        for feature in features
    )
    return [_side_by_side(blocks) for blocks in zip(*columns, strict=True)]


def _encoded(columns: Mapping[str, Column], feature: str, missing: Missing) -> list[Array]:
    """A block [N, width] for each part of one column; the first part is the training part."""
    noun = f"column {feature!r}"
    name, column = next(iter(columns.items()))
    if _is_category(column.type):
        fits, encode = _is_category, _encoded_categories
    elif _is_numeric(column.type):
        fits, encode = _is_numeric, _encoded_numbers
    else:
        raise DataError(
            f"{name}: {noun} has type {column.type}, which has no encoding as numbers; turn it "
            "into numbers, text or lists first, or leave it out with features=..."
        )
    for part, own in columns.items():
        if not fits(own.type) and not _pyarrow().types.is_null(own.type):
            raise DataError(
                f"{part}: {noun} has type {own.type}, but {column.type} in the training part"
            )
    return encode(columns, noun, missing)


def _encoded_numbers(columns: Mapping[str, Column], noun: str, missing: Missing) -> list[Array]:
    parts = [_numbers(column, noun, name) for name, column in columns.items()]
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
    if not any(holes):
        return parts
    lacking = np.isnan(train)
    if lacking.all(axis=0).any():
        raise DataError(
            f"{next(iter(columns))}: {noun} holds no value to take a mean of; "
            "leave it out with features=..."
        )
    means = np.asarray(np.nanmean(train, axis=0, dtype=np.float64), dtype=np.float32)
    flagged = np.flatnonzero(lacking.any(axis=0))
    return [_filled(part, means, flagged) for part in parts]


def _filled(values: Array, means: Array, flagged: Array) -> Array:
    lacking = np.isnan(values)
    filled = np.where(lacking, means, values.astype(np.float32, copy=False))
    return np.hstack([filled, lacking[:, flagged]])


def _has_holes(values: Array, noun: str, missing: Missing, name: str) -> bool:
    """Whether values are missing, where they may be; DataError for what float32 cannot hold."""
    limit = np.finfo(np.float32).max
    if values.dtype.kind != "f":
        return False
    # One pass over the good case: a comparison with NaN is false.
    small = values.dtype.itemsize <= limit.itemsize
    if (np.isfinite(values) if small else np.abs(values) <= limit).all():
        return False
    holes = int(np.count_nonzero(np.isnan(values)))
    if holes and missing == "refuse":
        raise _missing(noun, holes, values.size, name, _INDICATE)
    too_large = int(np.count_nonzero(np.isinf(values) if small else np.abs(values) > limit))
    if too_large:
        raise DataError(
            f"{name}: {noun} has {too_large} values that are infinite or too large for float32; "
            "rescale the column or drop these rows"
        )
    return True


def _encoded_categories(columns: Mapping[str, Column], noun: str, missing: Missing) -> list[Array]:
    (name, train), *_ = columns.items()
    wanted = _category_values(train).type
    parts = [_categories(own, wanted, noun, missing, part) for part, own in columns.items()]
    present = sorted(parts[0].drop_null().unique().to_pylist())
    if not present:
        raise DataError(f"{name}: {noun} holds no value at all; leave it out with features=...")
    if len(present) > _MOST_CATEGORIES:
        raise DataError(
            f"{name}: {noun} has {len(present)} different values, more than the "
            f"{_MOST_CATEGORIES} categories that become inputs; leave it out with "
            "features=..., or encode it as numbers"
        )
    categories = _pyarrow().array(present, type=wanted)
    return [_one_hot(part, categories, flagged=parts[0].null_count > 0) for part in parts]


def _categories(
    column: Column, wanted: ArrowType, noun: str, missing: Missing, name: str
) -> Column:
    """The values of a column, of the wanted type, none missing unless they may be."""
    # A column of which a file holds no value has no type to tell.
    unknown = _pyarrow().types.is_null(column.type)
    values = column.cast(wanted) if unknown else _category_values(column)
    if values.type != wanted:
        raise DataError(
            f"{name}: {noun} holds values of type {values.type}, but {wanted} in the training part"
        )
    if values.null_count and missing == "refuse":
        raise _missing(noun, values.null_count, len(values), name, _INDICATE)
    return values


def _one_hot(values: Column, categories: Column, flagged: bool) -> Array:
    """Rows [N, K + flagged] of booleans, no category where it is missing or unknown."""
    compute = require("pyarrow.compute", _INSTALL, "Reading a table")
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


# Types of columns ---------------------------------------------------------------------------


def _is_text(kind: ArrowType) -> bool:
    types = _pyarrow().types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_category(kind: ArrowType) -> bool:
    types = _pyarrow().types
    if types.is_dictionary(kind):
        inner = kind.value_type
        return _is_text(inner) or types.is_boolean(inner) or types.is_integer(inner)
    return _is_text(kind) or bool(types.is_boolean(kind))


def _is_numeric(kind: ArrowType) -> bool:
    """Whether a column is numbers or lists of them; a column without any value may be."""
    types, kind = _pyarrow().types, _stored_type(kind)
    if _is_list(kind):
        return _is_numeric(kind.value_type) or bool(types.is_boolean(kind.value_type))
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(number or types.is_null(kind))


def _stored_type(kind: ArrowType) -> ArrowType:
    return kind.storage_type if isinstance(kind, _pyarrow().BaseExtensionType) else kind


def _is_list(kind: ArrowType) -> bool:
    types = _pyarrow().types
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(plain or types.is_list_view(kind) or types.is_large_list_view(kind))


def _category_values(column: Column) -> Column:
    """A column of categories as large strings, booleans or int64, no dictionaries."""
    arrow = _pyarrow()
    if not arrow.types.is_dictionary(column.type):
        return column.cast(arrow.large_string()) if _is_text(column.type) else column
    chunks = [_plain(chunk.dictionary).take(chunk.indices) for chunk in column.chunks]
    empty = arrow.array([], type=column.type.value_type)
    return arrow.chunked_array(chunks or [_plain(empty)])


def _plain(values: Column) -> Column:
    arrow = _pyarrow()
    if _is_text(values.type):
        return values.cast(arrow.large_string())
    return values.cast(arrow.int64()) if arrow.types.is_integer(values.type) else values


def _numbers(column: Column, noun: str, name: str) -> Array:
    """Numbers [N, D] of a column of numbers (D = 1) or lists of them, NaN where missing."""
    arrow, kind = _pyarrow(), _stored_type(column.type)
    if kind != column.type:
        column = column.cast(kind)
    if _is_list(kind):
        return _list_numbers(column, noun, name)
    if arrow.types.is_null(kind) or arrow.types.is_decimal(kind):
        column = column.cast(arrow.float64())
    if arrow.types.is_boolean(kind):
        column = column.cast(arrow.uint8())
    values: Array = column.to_numpy(zero_copy_only=False)
    return values[:, np.newaxis]


def _list_numbers(column: Column, noun: str, name: str) -> Array:
    compute = require("pyarrow.compute", _INSTALL, "Reading a table")
    lengths = compute.min_max(compute.list_value_length(column))
    shortest, longest = lengths["min"].as_py(), lengths["max"].as_py()
    if shortest != longest:
        raise DataError(
            f"{name}: {noun} has lists of {shortest} to {longest} values; "
            "pad or cut them to one length"
        )
    if not longest:
        raise DataError(f"{name}: {noun} has only empty lists; leave it out with features=...")
    inner = _numbers(compute.list_flatten(column), noun, name)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    values = inner.reshape(np.count_nonzero(present), -1)
    if present.all():
        return values
    block = np.full((len(present), values.shape[1]), np.nan)
    block[present] = values
    return block


_DROP = "drop these rows first"
_INDICATE = "fill or drop them first, or say missing='indicator'"


def _missing(noun: str, count: int, of: int, name: str, advice: str) -> DataError:
    values = "value" if count == 1 else "values"
    return DataError(f"{name}: {noun} has {count} missing {values} of {of}; {advice}")
