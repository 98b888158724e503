"""Arrow tables and columns: read from whatever gives them, and seen as numbers or categories."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError, require, shown

Array = NDArray[Any]
#: pyarrow's `Table`, `ChunkedArray` or `Array`, and `DataType`; it is imported only where used.
Table = Any
Column = Any
ArrowType = Any
Missing = Literal["refuse", "indicator"]
#: The first pyarrow that casts the text columns of polars.
INSTALL = "pyarrow>=18"
NO_TEXT = "is no UTF-8 text; save it as UTF-8, whatever wrote the file"
#: What stands for no value among numbers; in a column of text it is a text like others.
NOTHING = ["", "NA", "N/A", "#N/A", "NaN", "nan", "-NaN", "-nan", "null", "NULL", "n/a"]
DROP = "drop these rows first"


def read_table(source: Any, name: str) -> Table:
    """The `pyarrow.Table` of a source that `from_table` takes; DataError for any other."""
    arrow = pyarrow_module()
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
    held = Counter(columns)
    for column in wanted:
        if column not in held:
            raise DataError(f"{name}: there is no column {column!r}; {_choice(column, columns)}")
        if held[column] > 1:
            raise DataError(f"{name}: there are several columns {column!r}; rename all but one")


def _choice(column: str, columns: Sequence[str]) -> str:
    near = {known.lower(): known for known in columns}
    close = [near[known] for known in get_close_matches(str(column).lower(), near)]
    if close:
        return f"close names are {', '.join(map(repr, close))}"
    return f"the columns are {shown(columns, 10)}"


def pyarrow_module() -> ModuleType:
    return require("pyarrow", INSTALL, "Reading a table")


def default_name(source: Any) -> str:
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
        return reader(path, name)
    except UnicodeDecodeError:
        raise DataError(f"{name}: a column's name {NO_TEXT}") from None
    except (pyarrow_module().ArrowException, OSError) as error:
        raise DataError(f"{name}: {path.name!r} cannot be read: {error}") from error


def _read_csv(path: Path, name: str) -> Table:
    csv = require("pyarrow.csv", INSTALL, "Reading a table")
    # An empty field is a missing value in a text column too.
    convert = csv.ConvertOptions(strings_can_be_null=True, null_values=NOTHING)
    table = csv.read_csv(path, convert_options=convert)
    odd = [c for c in table.column_names if pyarrow_module().types.is_binary(table[c].type)]
    if odd:
        raise DataError(f"{name}: column {odd[0]!r} {NO_TEXT}")
    return _as_written(path, table)


def _as_written(path: Path, table: Table) -> Table:
    """Columns that are codes as the file has them: "01" is no number, and "NA" may be a country.

    What is text in one site's file must not be numbers in another's, where all happen to be digits.
    """
    arrow, csv = pyarrow_module(), require("pyarrow.csv", INSTALL, "Reading a table")
    compute = require("pyarrow.compute", INSTALL, "Reading a table")
    types = arrow.types
    names = [
        name
        for name in dict.fromkeys(table.column_names)
        if table.column_names.count(name) == 1
        and (types.is_integer(table[name].type) or is_text(table[name].type))
    ]
    if not names:
        return table
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, arrow.string()), include_columns=names,
        strings_can_be_null=True, null_values=[""],
    )  # fmt: skip
    written = csv.read_csv(path, convert_options=convert)
    for name in names:
        codes = compute.any(compute.match_substring_regex(written[name], r"^\s*[+-]?0\d")).as_py()
        if codes or is_text(table[name].type):
            place = table.column_names.index(name)
            table = table.set_column(place, name, written[name])
    return table


def _read_parquet(path: Path, name: str) -> Table:
    parquet = require("pyarrow.parquet", INSTALL, "Reading a table")
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


def is_text(kind: ArrowType) -> bool:
    types = pyarrow_module().types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_category(kind: ArrowType) -> bool:
    types = pyarrow_module().types
    if types.is_dictionary(kind):
        inner = kind.value_type
        return is_text(inner) or types.is_boolean(inner) or types.is_integer(inner)
    return is_text(kind) or bool(types.is_boolean(kind))


def is_numeric(kind: ArrowType) -> bool:
    """Whether a column is numbers or lists of them; a column without any value may be."""
    types, kind = pyarrow_module().types, stored_type(kind)
    if is_list(kind):
        return is_numeric(kind.value_type) or bool(types.is_boolean(kind.value_type))
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(number or types.is_null(kind))


def stored_type(kind: ArrowType) -> ArrowType:
    return kind.storage_type if isinstance(kind, pyarrow_module().BaseExtensionType) else kind


def is_list(kind: ArrowType) -> bool:
    types = pyarrow_module().types
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(plain or types.is_list_view(kind) or types.is_large_list_view(kind))


def category_values(column: Column) -> Column:
    """A column of categories as large strings, booleans or int64, no dictionaries."""
    arrow = pyarrow_module()
    if not arrow.types.is_dictionary(column.type):
        return column.cast(arrow.large_string()) if is_text(column.type) else column
    chunks = [_plain(chunk.dictionary).take(chunk.indices) for chunk in column.chunks]
    empty = arrow.array([], type=column.type.value_type)
    return arrow.chunked_array(chunks or [_plain(empty)])


def _plain(values: Column) -> Column:
    arrow = pyarrow_module()
    if is_text(values.type):
        return values.cast(arrow.large_string())
    return values.cast(arrow.int64()) if arrow.types.is_integer(values.type) else values


def column_numbers(column: Column, noun: str, name: str) -> Array:
    """Numbers [N, D] of a column of numbers (D = 1) or lists of them, NaN where missing."""
    arrow, kind = pyarrow_module(), stored_type(column.type)
    if kind != column.type:
        column = column.cast(kind)
    if is_list(kind):
        return _list_numbers(column, noun, name)
    if arrow.types.is_null(kind) or arrow.types.is_decimal(kind):
        column = column.cast(arrow.float64())
    if arrow.types.is_boolean(kind):
        column = column.cast(arrow.uint8())
    values: Array = column.to_numpy(zero_copy_only=False)
    return values[:, np.newaxis]


def _list_numbers(column: Column, noun: str, name: str) -> Array:
    compute = require("pyarrow.compute", INSTALL, "Reading a table")
    lengths = compute.min_max(compute.list_value_length(column))
    shortest, longest = lengths["min"].as_py(), lengths["max"].as_py()
    if shortest != longest:
        raise DataError(
            f"{name}: {noun} has lists of {shortest} to {longest} values; "
            "pad or cut them to one length"
        )
    if not longest:
        raise DataError(f"{name}: {noun} has only empty lists; leave it out with features=...")
    inner = column_numbers(compute.list_flatten(column), noun, name)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    values = inner.reshape(np.count_nonzero(present), -1)
    if present.all():
        return values
    block = np.full((len(present), values.shape[1]), np.nan)
    block[present] = values
    return block


def missing_error(noun: str, count: int, of: int, name: str, advice: str) -> DataError:
    values = "value" if count == 1 else "values"
    return DataError(f"{name}: {noun} has {count} missing {values} of {of}; {advice}")
