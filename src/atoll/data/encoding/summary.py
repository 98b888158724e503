"""What one site tells of its table so that sites can agree: counts and moments, never rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atoll.core.files import write_json
from atoll.core.numbers import whole
from atoll.data.arrow import Array, default_name, is_list, read_table, stored_type
from atoll.data.encoding.encoding import UNIT
from atoll.data.encoding.kinds import NoValue, categories, check_codes, chosen, said_of
from atoll.data.encoding.schema import read, read_json, told
from atoll.data.encoding.values import MOST_CATEGORIES, Coded, numbers, plain
from atoll.errors import DataError

KIND, VERSION = "atoll.summary", 1
#: Values that fewer rows hold are not named.
LEAST = 5
#: Whole numbers of no more different values may be categories; their counts are told too.
FEW = 20


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """What is told of one column.

    Args:
        kind: "numbers" or "categories".
        counts: rows that hold a value, [width].
        missing: rows that do not, [width].
        width: numbers per row.
        unit: what they are counted in, where that is said.
        mean, deviation: [width], of the numbers that are there, but for rare ones that are too few
            to be told; the deviation divides by how many those are.
        values: categories, or whole numbers that are few, and how many rows hold each.
        rare: rows whose values are not told, for being held by too few.
        no_value: texts that mean that there is no value.
    """

    kind: str
    counts: tuple[int, ...]
    missing: tuple[int, ...]
    width: int = 1
    unit: str = ""
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    values: Mapping[str, int] = field(default_factory=dict)
    rare: int = 0
    no_value: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        places: list[tuple[float, ...]] = [self.counts, self.missing]
        if self.kind == "numbers":
            places += [self.mean, self.deviation]
        elif self.kind != "categories":
            raise DataError(f"kind is 'numbers' or 'categories', not {self.kind!r}")
        if not all(len(each) == self.width for each in places):
            raise DataError(f"it tells of {self.width} numbers per row, but not of each")
        if any(each < 0 for each in self.deviation):
            raise DataError("no deviation is below 0")
        if len(self.values) > MOST_CATEGORIES:
            raise DataError(f"it tells of {len(self.values)} values, more than become inputs")
        if not self.values and not self.rare and not all(self.counts):
            raise DataError("it tells of no value")


@dataclass(frozen=True)
class _Head:
    site: str
    rows: int
    target: str


@dataclass(frozen=True)
class Summary:
    """What one site tells of its table; `summarize` makes it, `agree` takes several.

    Args:
        site: whose table it is.
        rows: how many there are.
        columns: the columns, in the table's order, without the label.
        target: the label's name.
        label: the label.
    """

    site: str
    rows: int
    columns: Mapping[str, ColumnSummary]
    target: str
    label: ColumnSummary

    def json(self) -> dict[str, Any]:
        """Everything it tells, ready for JSON."""
        columns = {name: told(column) for name, column in self.columns.items()}
        return {
            "kind": KIND,
            "version": VERSION,
            "site": self.site,
            "rows": self.rows,
            "columns": columns,
            "target": self.target,
            "label": told(self.label),
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, to be looked at before it is sent."""
        write_json(Path(path), self.json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Summary:
        """Read what `save` has written; DataError for anything else."""
        plain = read_json(path)
        try:
            if not isinstance(plain, dict) or (plain.get("kind"), plain.get("version")) != (
                KIND,
                VERSION,
            ):
                raise DataError(f"this is no {KIND} of version {VERSION}")
            own = {key: plain[key] for key in ("site", "rows", "target") if key in plain}
            bare = read(_Head, own, "the summary")
            columns, label = plain.get("columns"), plain.get("label")
            known = {"kind", "version", "columns", "label", *own}
            if not isinstance(columns, dict) or set(plain) != known:
                raise DataError("it has kind, version, site, rows, columns, target, label")
            read_columns = {
                name: read(ColumnSummary, each, f"column {name!r}")
                for name, each in columns.items()
            }
            target = read(ColumnSummary, label, "the label")
            rows = {n + m for each in (*read_columns.values(), target)
                    for n, m in zip(each.counts, each.missing, strict=True)}  # fmt: skip
            if not bare.site.isprintable() or rows - {bare.rows}:
                raise DataError("its site is no name, or its counts are not of its rows")
            return cls(bare.site, bare.rows, read_columns, bare.target, target)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def __str__(self) -> str:
        lines = [f"{self.site}: {self.rows} rows"]
        everything = {**self.columns, f"{self.target} (label)": self.label}
        width = max(map(len, everything))
        lines += [f"  {name:<{width}}  {_words(column)}" for name, column in everything.items()]
        return "\n".join(lines)


def summarize(
    source: Any,
    *,
    label: str,
    features: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    units: Mapping[str, str] | None = None,
    no_value: NoValue = (),
    least: int = LEAST,
    site: str | None = None,
) -> Summary:
    """What a site tells of its table.

    Of numbers, how many there are, their mean and deviation; of categories and whole numbers of
    few values, how many rows hold each, where `least` or more do. No row leaves, but means of few
    rows say much of them: look at it before it is sent.

    Args:
        source: what `from_table` takes.
        label: the label's column.
        features: columns to tell of; None is every other column.
        leave_out: columns that are told nothing of: names of patients, owners.
        units: what columns are counted in; "weight [kg]" as a column's name says it too.
        no_value: texts or numbers that mean that there is no value, in all columns or by column.
        least: fewest rows that hold a value that is named.
        site: whose table it is; None is the file's name.
    """
    name = site or default_name(source)
    table = read_table(source, name)
    wanted = chosen(table, label, features, leave_out, name)
    titles = (*wanted, label)
    said = {**(units or {})}
    unknown = [column for column in said if column not in titles]
    if unknown:
        raise DataError(f"{name}: a unit is said of {unknown[0]!r}, which is no column")
    whole("least", least, 1, DataError)
    if len(table) < least:
        raise DataError(
            f"{name}: {len(table)} rows are too few to tell anything of; {least} are needed"
        )
    codes = said_of(no_value, titles, name)

    def of(column: str, noun: str, most: int) -> tuple[str, ColumnSummary]:
        match = UNIT.fullmatch(column)
        own = codes.get(column)
        found = categories(table[column], noun, name, own, column)
        if found is not None:
            if column in said:
                raise DataError(f"{name}: {noun} has unit {said[column]!r}, but is no numbers")
            # What stands in brackets after categories is no unit.
            return column, _of_categories(found, own or (), least)
        bare, unit = (match["name"], match["unit"]) if match else (column, "")
        unit = said.get(column, unit)
        return bare, _of_numbers(table[column], unit, noun, name, own, column, least, most)

    columns = dict(of(column, f"column {column!r}", FEW) for column in wanted)
    if len(columns) < len(wanted):
        raise DataError(f"{name}: two columns differ by their unit only; take one out")
    target = of(label, f"label column {label!r}", MOST_CATEGORIES)
    return Summary(name, len(table), columns, *target)


def _of_categories(found: Coded, codes: tuple[str, ...], least: int) -> ColumnSummary:
    counts = found.counts()
    values = {text: count for text, count in sorted(counts.items()) if count >= least}
    return ColumnSummary(
        kind="categories", counts=(sum(counts.values()),), missing=(found.missing,), values=values,
        rare=sum(counts.values()) - sum(values.values()), no_value=codes,
    )  # fmt: skip


def _of_numbers(
    column: Any, unit: str, noun: str, name: str, said: tuple[str, ...] | None, title: str,
    least: int, most: int,
) -> ColumnSummary:  # fmt: skip
    codes = said or ()
    values = numbers(column, noun, name, codes)
    if said is None and values.shape[1] == 1:
        check_codes(values[:, 0].astype(np.float64), noun, name, title)
    there = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, np.bool_)
    held = there.sum(axis=0)
    if held.min() < least:
        raise DataError(
            f"{name}: {noun} holds {int(held.min())} values; a mean of fewer than {least} would "
            f"tell what they are: leave_out=[{title!r}]"
        )
    all_whole = bool((values[there] == np.floor(values[there])).all())
    few: dict[str, int] = {}
    rare = 0
    if all_whole and values.shape[1] == 1 and not is_list(stored_type(column.type)):
        different, often = np.unique(values[there], return_counts=True)
        if len(different) <= most:
            counts = {plain(float(v)): int(n) for v, n in zip(different, often, strict=True)}
            few = {text: count for text, count in counts.items() if count >= least}
            rare = sum(counts.values()) - sum(few.values())
            if 0 < rare < least:
                # A mean over them too would tell what the few are.
                told = [v for v, n in zip(different, often, strict=True) if n >= least]
                there &= np.isin(values, told)
    mean = np.atleast_1d(np.mean(values, axis=0, dtype=np.float64, where=there))
    square = np.mean(np.square(values - mean), axis=0, dtype=np.float64, where=there)
    return ColumnSummary(
        kind="numbers", counts=tuple(held.tolist()), width=values.shape[1], unit=unit,
        missing=tuple((len(values) - held).tolist()), mean=tuple(mean.tolist()),
        deviation=tuple(np.atleast_1d(np.sqrt(square)).tolist()), values=few,
        rare=rare, no_value=codes,
    )  # fmt: skip


def _words(column: ColumnSummary) -> str:
    missing = f", {max(column.missing)} missing" if any(column.missing) else ""
    if column.kind == "numbers":
        unit = f" {column.unit}" if column.unit else ""
        width = f", {column.width} a row" if column.width > 1 else ""
        mean = f"mean {column.mean[0]:.6g}, deviation {column.deviation[0]:.6g}"
        return f"numbers{width}: {mean}{unit}{missing}" + (
            f"; {_counted(column)}" if column.values else ""
        )
    return f"categories: {_counted(column)}{missing}"


def _counted(column: ColumnSummary) -> str:
    told = [f"{text} {count}" for text, count in column.values.items()]
    rare = f"; {column.rare} rows hold rare values" if column.rare else ""
    return ", ".join(told[:12]) + (f" and {len(told) - 12} more" * (len(told) > 12)) + rare


def pooled(columns: Sequence[ColumnSummary], factors: Sequence[float]) -> tuple[Array, Array]:
    """Mean and deviation [width] of all sites' numbers together, each multiplied by its factor.

    The counts' parallel rule (Chan, Golub and LeVeque 1979, eq. 2.1).
    """
    counts = np.array([column.counts for column in columns], np.float64)
    scale = np.array(factors)[:, np.newaxis]
    means = np.array([column.mean for column in columns]) * scale
    squares = (np.array([column.deviation for column in columns]) * scale) ** 2
    total = counts.sum(axis=0)
    mean = (counts * means).sum(axis=0) / total
    square = (counts * (squares + (means - mean) ** 2)).sum(axis=0) / total
    return mean, np.sqrt(square)
