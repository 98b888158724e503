"""Agreement: one encoding from what several sites tell of their tables, or all that hinders it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from atoll.data.encoding.columns import Categories, Numbers
from atoll.data.encoding.compared import Compared, Decisions, Missing, Unknown, listed
from atoll.data.encoding.encoding import Encoding
from atoll.data.encoding.summary import ColumnSummary, Summary
from atoll.data.encoding.values import plain
from atoll.errors import DataError, shown

#: So many names are looked at for one that is alike.
MANY = 200


def agree(
    summaries: Iterable[Summary],
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, str]] | None = None,
    units: Mapping[str, Mapping[str, float]] | None = None,
    alike: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    missing: Missing = "refuse",
    unknown: Unknown = "refuse",
    scale: bool = False,
    task: str | None = None,
) -> Encoding:
    """One encoding for several sites' tables, in the order of the first one's columns.

    Where sites differ in a way that may have two meanings, nothing is guessed: all of it is said
    in one DataError, with what to write to decide it.

    Args:
        summaries: what each site tells (see `summarize`).
        columns: other names of columns, and the columns that they are: {"Chol": "chol"}.
        values: other spellings, by column: {"sex": {"F": "female", "1": "male"}}.
        units: by column, other units and what their values are multiplied by to be in the agreed
            one: {"chol": {"mmol/l": 38.67}}.
        alike: columns whose different values or sizes are right as they are.
        leave_out: columns that become no input.
        missing: "refuse", or "indicator": numbers are filled with the mean of all sites, categories
            with zeros, and columns that lack values anywhere are followed by an input that is 1
            where there was none.
        unknown: what becomes of categories that no site has told: "refuse", or "zeros".
        scale: whether numbers are brought to mean 0 and deviation 1 over all sites.
        task: "regression" for a label of few whole numbers that are amounts and not classes.
    """
    told = list(summaries)
    decided = Decisions(
        columns={**(columns or {})},
        values={column: _spelled(same) for column, same in (values or {}).items()},
        units={column: _factors(column, of) for column, of in (units or {}).items()},
        alike=frozenset(alike),
        leave_out=frozenset(leave_out),
    )
    for noun, given, known in (
        ("missing", missing, ("refuse", "indicator")), ("unknown", unknown, ("refuse", "zeros")),
        ("task", task, (None, "classification", "regression")),
    ):  # fmt: skip
        if given not in known:
            raise DataError(f"{noun} must be {' or '.join(map(repr, known))}, not {given!r}")
    if not told:
        raise DataError("there is no summary to agree on")
    sites = [summary.site for summary in told]
    if len(set(sites)) < len(sites):
        raise DataError(f"two summaries are of {max(sites, key=sites.count)!r}; name their sites")
    found = _Columns(told, decided, unknown)
    inputs: dict[str, Numbers | Categories] = {}
    for column in found.inputs:
        own = found.of(column)
        if own is not None and own.categories:
            inputs[column] = own.as_categories(missing, unknown)
        elif own is not None:
            inputs[column] = own.as_numbers(missing, scale)
    label = found.of(found.target)
    found.raise_faults()
    assert label is not None
    return Encoding(inputs, label.as_label(task), found.target)


def _spelled(same: Mapping[str, str]) -> dict[str, str]:
    return {plain(spelling): plain(value) for spelling, value in same.items()}


def _factors(column: str, units: Mapping[str, float]) -> dict[str, float]:
    try:
        return {unit: float(by) for unit, by in units.items()}
    except (TypeError, ValueError):
        raise DataError(
            f"units of {column!r} are names and numbers to multiply by, not {units!r}"
        ) from None


class _Columns:
    """Which site tells what of which column, and what they do not agree on."""

    def __init__(self, told: Sequence[Summary], decided: Decisions, unknown: Unknown) -> None:
        self.told, self.decided, self.unknown = told, decided, unknown
        self.faults: list[str] = []
        self.target = self._name(told[0].target)
        self._tables = [self._renamed(summary) for summary in told]
        others = [s for s in told if self._name(s.target) != self.target]
        for summary in others:
            self.faults.append(
                f"the label is {self.target!r} at {told[0].site} and {summary.target!r} at "
                f"{summary.site}: if they are the same, columns={{{summary.target!r}: "
                f"{self.target!r}}}"
            )
        self.inputs = self._inputs()
        known = {self.target, *(name for table in self._tables for name in table)}
        for noun, given in (
            ("values", decided.values), ("units", decided.units), ("alike", decided.alike),
            ("leave_out", {self._name(n): 0 for n in decided.leave_out}),
            ("columns", set(decided.columns.values())),
        ):  # fmt: skip
            odd = sorted(set(given) - known)
            if odd:
                self.faults.append(f"{noun} names {shown(odd)}, which no site has")

    def _name(self, column: str) -> str:
        return self.decided.columns.get(column, column)

    def _renamed(self, summary: Summary) -> dict[str, ColumnSummary]:
        found: dict[str, ColumnSummary] = {}
        for column, told in summary.columns.items():
            name = self._name(column)
            if name in found or name == self.target:
                self.faults.append(f"{summary.site} has two columns that are {name!r}")
            found[name] = told
        return found

    def _inputs(self) -> list[str]:
        """Columns that all have, in the first one's order; others are a fault."""
        left = {self._name(name) for name in self.decided.leave_out} | self.decided.leave_out
        everything = list(dict.fromkeys(name for table in self._tables for name in table))
        shared = [name for name in everything if name not in left]
        common = [name for name in shared if all(name in table for table in self._tables)]
        paired: set[str] = set()
        for name in shared:
            if name in common or name in paired:
                continue
            have = [
                s.site for s, table in zip(self.told, self._tables, strict=True) if name in table
            ]
            others = [n for n in shared if n != name and n not in common and not any(
                n in table and name in table for table in self._tables)]  # fmt: skip
            # Of very many it would take for ever.
            cased = {n.casefold(): n for n in others[:MANY]}
            near = get_close_matches(name.casefold(), cased, 1, 0.5)
            close = next((n for n in others if near and n.casefold() == near[0]), "another")
            has = "has" if len(have) == 1 else "have"
            if close == "another":
                self.faults.append(
                    f"only {listed(have)} {has} a column {name!r}: if it is called otherwise "
                    f"elsewhere, columns={{that: {name!r}}}; if not, leave_out=[{name!r}]"
                )
                continue
            paired.add(close)
            self.faults.append(
                f"only {listed(have)} {has} a column {name!r}: if that is {close!r} elsewhere, "
                f"columns={{{close!r}: {name!r}}}; if not, leave_out=[{name!r}, {close!r}]"
            )
        if not common:
            self.faults.append("there is no column that all sites have")
        return common

    def of(self, column: str) -> Compared | None:
        """A column of all sites, unless they do not agree on it."""
        label = column == self.target
        sites = {
            summary.site: summary.label if label else table[column]
            for summary, table in zip(self.told, self._tables, strict=True)
        }
        names = (
            [s.target for s in self.told] if label else [n for s in self.told for n in s.columns]
        )
        called = [n for n in dict.fromkeys(names) if n != column and self._name(n) == column]
        found = Compared(column, sites, tuple(called), self.decided, label)
        faults = found.faults(self.unknown)
        self.faults += faults
        return None if faults else found

    def raise_faults(self) -> None:
        if self.faults:
            lines = "".join(f"\n  - {fault}" for fault in dict.fromkeys(self.faults))
            raise DataError(f"the sites' tables do not agree yet:{lines}")
