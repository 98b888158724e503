"""Encoding: what a table's columns and label become, the same at every site and for prediction."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from atoll.core.files import write_json
from atoll.data.arrow import Array, Table, check_columns, default_name, read_table
from atoll.data.encoding.columns import Amounts, Categories, Classes, Column, Numbers
from atoll.data.encoding.schema import read, read_json, told
from atoll.errors import DataError

Input = Numbers | Categories
Label = Classes | Amounts

KIND, VERSION = "atoll.encoding", 1
#: "weight [kg]" says what a column is counted in.
UNIT = re.compile(r"(?P<name>.*\S)\s*[\[(](?P<unit>[^\[\]()]+)[\])]\s*")
#: Bytes of the output that are filled at a time, so that its rows stay in the cache.
_FILL_BYTES = 1 << 18


@dataclass(frozen=True)
class Encoding:
    """What a table's columns become as inputs, and its label as targets.

    It is made once, from a table (`fit`) or from what several sites tell of theirs (`agree`), kept
    as readable JSON (`save`, `load`), and given to whoever reads a table: columns are found by
    their names, categories and classes by their texts, and what does not fit is refused.

    Args:
        columns: the inputs, in order, by name.
        label: the target.
        target: the label's name.
    """

    columns: Mapping[str, Input]
    label: Label
    target: str

    def __post_init__(self) -> None:
        if not self.columns:
            raise DataError("an encoding has at least one column")
        names = [self.target, *self.columns, *self.label.called]
        names += [other for column in self.columns.values() for other in column.called]
        double = sorted(name for name, often in Counter(names).items() if often > 1)
        if double:
            raise DataError(f"two columns of the encoding are called {double[0]!r}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What each of the F inputs is: "age", "sex=f", "age missing", "pixels[3]"."""
        return names_of(self.columns)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the label; empty for amounts."""
        return self.label.values if isinstance(self.label, Classes) else ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything it says."""
        return sha256(json.dumps(self.json(), sort_keys=True).encode()).hexdigest()

    def inputs(
        self, table: Table, name: str, units: Mapping[str, str] | None = None
    ) -> NDArray[np.float32]:
        """Inputs [N, F] of a table, which `name` is said of; `units` of columns, if they differ.

        Raises DataError for what does not fit.
        """
        self._check_units(units, name)
        return inputs_of(self.columns, table, name, units)

    def _check_units(self, units: Mapping[str, str] | None, name: str) -> None:
        known = {self.target, *self.label.called, *self.columns}
        known |= {other for column in self.columns.values() for other in column.called}
        bare = {said: match["name"] for said in units or () if (match := UNIT.fullmatch(said))}
        odd = [said for said in units or () if said not in known and bare.get(said) not in known]
        if odd:
            raise DataError(f"{name}: a unit is said of {odd[0]!r}, which the encoding has not")

    def apply(self, source: Any, *, units: Mapping[str, str] | None = None) -> NDArray[np.float32]:
        """Inputs [N, F] of whatever `data.from_table` reads, which need not have the label."""
        name = default_name(source)
        return self.inputs(read_table(source, name), name, units)

    def targets(self, table: Table, name: str, units: Mapping[str, str] | None = None) -> Array:
        """Labels [N], or amounts [N] or [N, width], of a table."""
        names = _Names(table.column_names)
        found, unit = _found(names, self.target, self.label, name, units or {})
        check_columns((found,), table.column_names, name)
        self._check_units(units, name)
        return self.label.targets(table[found], f"label column {found!r}", name, unit)

    def holds_label(self, table: Table) -> bool:
        """Whether a table has the label's column."""
        return bool(_Names(table.column_names).of(self.target, self.label))

    def difference(self, other: Encoding, here: str, there: str) -> str:
        """How this encoding, of `here`, differs from another, in words; empty if it does not."""
        mine, theirs = self._flat(), other._flat()
        found = []
        for key in dict.fromkeys([*mine, *theirs]):
            own, others = mine.get(key), theirs.get(key)
            if own is None or others is None:
                found.append(f"only {here if others is None else there} has {key}")
            elif own != others:
                parts = [
                    f"{part} is {_said(own, part)} at {here} and {_said(others, part)} at {there}"
                    for part in dict.fromkeys([*own, *others])
                    if own.get(part) != others.get(part)
                ]
                found.append(f"of {key} {', '.join(parts)}")
        if not found and list(self.columns) != list(other.columns):
            found = ["the columns stand in another order"]
        more = len(found) - 5
        return "; ".join(found[:5]) + (f"; and {more} more" if more > 0 else "")

    def _flat(self) -> dict[str, dict[str, Any]]:
        found = {f"column {name!r}": _json(column) for name, column in self.columns.items()}
        return found | {f"label {self.target!r}": _json(self.label)}

    def json(self) -> dict[str, Any]:
        """Everything it says, ready for JSON."""
        return {
            "kind": KIND,
            "version": VERSION,
            "columns": {name: _json(column) for name, column in self.columns.items()},
            "label": {"column": self.target, **_json(self.label)},
        }

    @classmethod
    def read(cls, plain: Any, name: str = "encoding") -> Encoding:
        """An encoding from what `json` gives, checked against its closed schema."""
        try:
            if not isinstance(plain, dict) or plain.get("kind") != KIND:
                raise DataError(f"this is no {KIND}")
            if plain.get("version") != VERSION:
                raise DataError(f"it has version {plain.get('version')!r}; this atoll reads 1")
            if set(plain) != {"kind", "version", "columns", "label"}:
                raise DataError("it has kind, version, columns and label, and nothing else")
            columns, label = plain["columns"], plain["label"]
            if not isinstance(columns, dict) or not isinstance(label, dict):
                raise DataError("columns and label are objects")
            target = label.get("column")
            if not isinstance(target, str):
                raise DataError("the label's column is a text")
            rest = {key: value for key, value in label.items() if key != "column"}
            inputs = {
                key: cast(Input, _column(value, key, (Numbers, Categories)))
                for key, value in columns.items()
            }
            return cls(inputs, cast(Label, _column(rest, target, (Classes, Amounts))), target)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write it as JSON for people to read."""
        write_json(Path(path), self.json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Encoding:
        """Read what `save` has written; DataError for anything else."""
        return cls.read(read_json(path), str(path))

    def __str__(self) -> str:
        rows = [(name, *_words(column)) for name, column in self.columns.items()]
        rows.append((f"{self.target} (label)", *_words(self.label)))
        width = max(len(row[0]) for row in rows)
        lines = [f"  {name:<{width}}  {kind:<10}  {words}" for name, kind, words in rows]
        return "\n".join([f"{len(self.names)} inputs of {len(self.columns)} columns", *lines])


def names_of(columns: Mapping[str, Input]) -> tuple[str, ...]:
    """What each of the F inputs is that these columns become."""
    return tuple(name for column, kind in columns.items() for name in kind.names(column))


def inputs_of(
    columns: Mapping[str, Input], table: Table, name: str, units: Mapping[str, str] | None = None
) -> NDArray[np.float32]:
    """Inputs [N, F] that these columns of a table become."""
    if len(table) == 0:
        raise DataError(f"{name}: there are no examples")
    names = _Names(table.column_names)
    places = [_found(names, column, kind, name, units or {}) for column, kind in columns.items()]
    check_columns([found for found, _ in places], table.column_names, name)
    return side_by_side(
        [
            kind.block(table[found], f"column {found!r}", name, unit)
            for (found, unit), kind in zip(places, columns.values(), strict=True)
        ]
    )


def _found(
    names: _Names, column: str, kind: Column, name: str, units: Mapping[str, str]
) -> tuple[str, str]:
    """What a column is called in a table, and its unit where that is said."""
    found = names.of(column, kind)
    if len(found) > 1:
        raise DataError(
            f"{name}: columns {' and '.join(map(repr, found))} are both {column!r}; take one out"
        )
    if not found:
        check_columns((column,), names.all, name)
    (own,) = found
    said = UNIT.fullmatch(own)
    unit = said["unit"] if said and own not in (column, *kind.called) else ""
    return own, units.get(column, units.get(own, unit))


def _said(plain: Mapping[str, Any], part: str) -> str:
    return repr(plain[part]) if part in plain else "not said"


def _json(column: Column) -> dict[str, Any]:
    return {"kind": column.kind, **told(column)}


def _column(plain: Any, name: str, kinds: Sequence[type[Column]]) -> Column:
    """A column of one of these kinds from its JSON."""
    by_name = {kind.kind: kind for kind in kinds}
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(kind, str) or kind not in by_name:
        raise DataError(f"{name!r} needs a kind: {' or '.join(map(repr, by_name))}")
    rest = {key: value for key, value in plain.items() if key != "kind"}
    return read(by_name[kind], rest, repr(name))


class _Names:
    """The names of a table's columns, found by themselves or without the unit in them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.all = names
        self._own = set(names)
        self._bare: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            match = UNIT.fullmatch(name)
            if match:
                self._bare.setdefault(match["name"], []).append(name)

    def of(self, column: str, kind: Column) -> list[str]:
        """What a column may be called here."""
        known = (column, *kind.called)
        found = [name for name in known if name in self._own]
        return found or [name for each in known for name in self._bare.get(each, ())]


def _words(column: Column) -> tuple[str, str]:
    """A column's kind and the rest for people."""
    plain = told(column)
    parts = []
    if "values" in plain:
        values = plain.pop("values")
        parts.append(", ".join(values[:8]) + (f" and {len(values) - 8} more" * (len(values) > 8)))
    for key, value in plain.items():
        if isinstance(value, dict):
            value = ", ".join(f"{one} -> {other}" for one, other in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value[:4])
        parts.append(f"{key.replace('_', ' ')} {value}")
    return column.kind, "; ".join(parts)


def side_by_side(blocks: Sequence[Array]) -> NDArray[np.float32]:
    """Blocks [N, width] of any number type as one float32 array [N, sum of widths]."""
    edges = np.cumsum([0, *(block.shape[1] for block in blocks)]).tolist()
    x = np.empty((len(blocks[0]), edges[-1]), dtype=np.float32)
    step = max(64, _FILL_BYTES // (x.itemsize * edges[-1]))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        for block, left, right in zip(blocks, edges, edges[1:], strict=False):
            x[rows, left:right] = block[rows]
    return x
