"""Agreement: one encoding from what several sites tell of their tables, or all that hinders it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import combinations
from typing import Literal

import numpy as np

from atoll.data.encoding.columns import Amounts, Categories, Classes, Numbers
from atoll.data.encoding.encoding import Encoding
from atoll.data.encoding.summary import ColumnSummary, Summary, pooled
from atoll.data.encoding.values import in_order, is_number, letters, plain, shown
from atoll.errors import DataError

Missing = Literal["refuse", "indicator"]
Unknown = Literal["refuse", "zeros"]
#: Means that are so many of the smaller deviations apart, or deviations that are so many times as
#: large, may be of another unit; of constants, means that are so many times as large.
APART, SPREADS, TIMES = 3.0, 5.0, 3.0
#: Whole numbers of no more different values may be codes, as 1 and 2 for 0 and 1.
CODED = 3
#: So many names are looked at for one that is alike.
MANY = 200


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What people have decided where sites differ."""

    columns: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    units: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()
    leave_out: frozenset[str] = frozenset()


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
                    f"only {_sites(have)} {has} a column {name!r}: if it is called otherwise "
                    f"elsewhere, columns={{that: {name!r}}}; if not, leave_out=[{name!r}]"
                )
                continue
            paired.add(close)
            self.faults.append(
                f"only {_sites(have)} {has} a column {name!r}: if that is {close!r} elsewhere, "
                f"columns={{{close!r}: {name!r}}}; if not, leave_out=[{name!r}, {close!r}]"
            )
        if not common:
            self.faults.append("there is no column that all sites have")
        return common

    def of(self, column: str) -> _Column | None:
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
        found = _Column(column, sites, tuple(called), self.decided, label)
        faults = found.faults(self.unknown)
        self.faults += faults
        return None if faults else found

    def raise_faults(self) -> None:
        if self.faults:
            lines = "".join(f"\n  - {fault}" for fault in dict.fromkeys(self.faults))
            raise DataError(f"the sites' tables do not agree yet:{lines}")


class _Column:
    """What the sites tell of one column."""

    def __init__(
        self, name: str, sites: Mapping[str, ColumnSummary], called: tuple[str, ...],
        decided: Decisions, label: bool,
    ) -> None:  # fmt: skip
        self.name, self.sites, self.called, self.label = name, sites, called, label
        self.noun = f"{'label' if label else 'column'} {name!r}"
        self.same = dict(decided.values.get(name, {}))
        self.factors = {unit: float(by) for unit, by in decided.units.get(name, {}).items()}
        self.alike = name in decided.alike
        kinds = {told.kind for told in sites.values()}
        self.categories = "categories" in kinds or bool(self.same)
        #: A label of few whole numbers: what is a class at one site is one at another.
        self._classes = label and all(told.values for told in sites.values())
        codes = [code for told in sites.values() for code in told.no_value]
        self.no_value = tuple(dict.fromkeys(codes))

    def faults(self, unknown: Unknown) -> list[str]:
        """What the sites do not agree on."""
        found = [*self._faults_of_codes()]
        kind = self._faults_of_categories if self.categories or self._classes else None
        found += (kind or self._faults_of_numbers)()
        held = {value for told in self.sites.values() for value in told.values}
        stray = sorted(set(self.same) - held)
        rare = [site for site, told in self.sites.items() if told.rare]
        if stray and not rare:
            found.append(f"values says {shown(stray)} of {self.noun}, which no site holds")
        if rare and self.categories and unknown == "refuse" and not (self.alike or stray):
            found.append(
                f"{self.noun} holds values at {_sites(rare)} that too few rows hold to be told, so "
                "that these rows would be refused there: bring them into another category "
                f"(values={{{self.name!r}: {{the value: another}}}}), or unknown='zeros'"
            )
        return found

    def _faults_of_codes(self) -> Iterable[str]:
        """What means no value at one site, and may be a value at another."""
        for site, told in self.sites.items():
            for code in told.no_value:
                for other, theirs in self.sites.items():
                    if code in theirs.no_value or not _may_hold(theirs, code):
                        continue
                    yield (
                        f"{code!r} means no value in {self.noun} at {site}, and may be a value at "
                        f"{other}: say so at both with no_value, or recode it at one"
                    )

    def _faults_of_categories(self) -> Iterable[str]:
        for site, told in self.sites.items():
            if told.kind == "numbers" and not (told.values or told.rare):
                words = [s for s, t in self.sites.items() if t.kind == "categories"]
                yield (
                    f"{self.noun} is numbers at {site} and categories at {_sites(words)}: bring it "
                    f"into one form, or leave_out=[{self.name!r}]"
                )
                return
        if any(told.unit for told in self.sites.values()):
            yield f"{self.noun} has a unit at one site, and categories at another"
        vocabularies = {site: self._vocabulary(told) for site, told in self.sites.items()}
        empty = [site for site, values in vocabularies.items() if not values]
        if empty:
            yield (
                f"{self.noun} has no value at {_sites(empty)} that is held by enough rows to be "
                f"told: summarize with a smaller least there, or leave_out=[{self.name!r}]"
            )
            return
        if self.alike:
            return
        alike: dict[str, list[str]] = {}
        for value in in_order({value for values in vocabularies.values() for value in values}):
            alike.setdefault(letters(value), []).append(value)
        for one, *others in (group for group in alike.values() if len(group) > 1):
            same = ", ".join(f"{other!r}: {one!r}" for other in others)
            yield (
                f"{self.noun} holds {one!r} and {shown(others)}: if they are the same, values="
                f"{{{self.name!r}: {{{same}}}}}; if not, alike=[{self.name!r}]"
            )
        first = {value: group[0] for group in alike.values() for value in group}
        yield from self._faults_of_words(
            {site: [first[value] for value in values] for site, values in vocabularies.items()}
        )

    def _faults_of_words(self, vocabularies: Mapping[str, Sequence[str]]) -> Iterable[str]:
        """Two sites each of which has a value that the other has not: they may be the same."""
        said: set[tuple[frozenset[str], frozenset[str]]] = set()
        for (one, mine), (other, theirs) in combinations(vocabularies.items(), 2):
            own, others = set(mine) - set(theirs), set(theirs) - set(mine)
            pair = (frozenset(own), frozenset(others))
            if not own or not others or pair in said or pair[::-1] in said:
                continue
            said.add(pair)
            first, second = in_order(own), in_order(others)
            yield (
                f"{self.noun} holds {shown(first)} at {one} only, and {shown(second)} at {other}: "
                f"if some are the same, values={{{self.name!r}: {{{second[0]!r}: {first[0]!r}, "
                f"...}}}}; if one site's codes mean something else, recode them there; "
                f"alike=[{self.name!r}] if all are different"
            )

    def _vocabulary(self, told: ColumnSummary) -> tuple[str, ...]:
        return in_order({self.same.get(value, value) for value in told.values})

    def _faults_of_numbers(self) -> Iterable[str]:
        widths = {told.width for told in self.sites.values()}
        if len(widths) > 1:
            yield f"{self.noun} has {' and '.join(map(str, sorted(widths)))} numbers per row"
            return
        units = {told.unit for told in self.sites.values()} - set(self.factors)
        if len(units) > 1 or (self.factors and units == {""}):
            said = ", ".join(f"{told.unit or 'nothing'} at {s}" for s, told in self.sites.items())
            yield (
                f"{self.noun} is said to be in other units ({said}): units={{{self.name!r}: "
                "{other unit: factor to the agreed one}}, and a unit at every site"
            )
            return
        if self.alike:
            return
        few = {site: tuple(told.values) for site, told in self.sites.items()}
        if all(0 < len(values) <= CODED for values in few.values()):
            yield from self._faults_of_words(few)
            return
        for (one, mine), (other, theirs) in combinations(self._scaled().items(), 2):
            for place in range(mine.width):
                told = [(each.mean[place], each.deviation[place]) for each in (mine, theirs)]
                if _of_another_size(*told):
                    (a, s), (b, t) = told
                    yield (
                        f"{self.noun} is of another size at {one} (mean {a:.4g}, deviation "
                        f"{s:.3g}) than at {other} ({b:.4g}, {t:.3g}): say the units, or "
                        f"alike=[{self.name!r}] if it is right"
                    )
                    return

    def _scaled(self) -> dict[str, ColumnSummary]:
        """What each site tells, in the agreed unit."""
        found = {}
        for site, told in self.sites.items():
            by = self.factors.get(told.unit, 1.0)
            found[site] = replace(
                told,
                mean=tuple(each * by for each in told.mean),
                deviation=tuple(each * by for each in told.deviation),
            )
        return found

    @property
    def unit(self) -> str:
        return next((t.unit for t in self.sites.values() if t.unit not in self.factors), "")

    def as_numbers(self, missing: Missing, scale: bool) -> Numbers:
        told = [*self.sites.values()]
        mean, deviation = pooled(told, [self.factors.get(each.unit, 1.0) for each in told])
        lacking = np.sum([each.missing for each in told], axis=0) > 0
        flagged = tuple(np.flatnonzero(lacking).tolist())
        filled = missing == "indicator"
        spread = np.where(deviation > 0, deviation, 1.0)
        return Numbers(
            called=self.called,
            no_value=self.no_value,
            width=told[0].width,
            unit=self.unit,
            units=self.factors,
            centre=tuple(mean.tolist()) if scale else (),
            spread=tuple(spread.tolist()) if scale else (),
            fill=tuple(mean.tolist()) if filled else (),
            flagged=flagged if filled else (),
        )

    def _values(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """The agreed texts in order, and the other spellings of them."""
        held = {value for told in self.sites.values() for value in told.values}
        values = in_order({self.same.get(value, value) for value in held} | set(self.same.values()))
        return values, {
            spelling: value for spelling, value in self.same.items() if spelling != value
        }

    def as_categories(self, missing: Missing, unknown: Unknown) -> Categories:
        values, same = self._values()
        lacking = any(any(told.missing) for told in self.sites.values())
        gaps = ("indicator" if lacking else "zeros") if missing == "indicator" else "refuse"
        return Categories(
            called=self.called, no_value=self.no_value, values=values, same=same, unknown=unknown,
            missing=gaps,
        )  # fmt: skip

    def as_label(self, task: str | None) -> Classes | Amounts:
        told = [*self.sites.values()]
        few = all(each.values or each.rare for each in told)
        if task == "regression" and self.categories:
            raise DataError(f"{self.noun} is no amount at every site, but task='regression'")
        if task == "classification" and not (self.categories or few):
            raise DataError(f"{self.noun} has fractions or many values, but is to be classes")
        if self.categories or (few and task in (None, "classification")):
            values, same = self._values()
            return Classes(called=self.called, no_value=self.no_value, values=values, same=same)
        return Amounts(
            called=self.called, no_value=self.no_value, width=told[0].width, unit=self.unit,
            units=self.factors,
        )  # fmt: skip


def _may_hold(told: ColumnSummary, code: str) -> bool:
    """Whether a code is, or may be, a value among what a site tells."""
    if told.values or told.kind == "categories":
        return letters(code) in map(letters, told.values)
    if not is_number(code):
        return False
    return any(
        abs(float(code) - mean) <= APART * spread
        for mean, spread in zip(told.mean, told.deviation, strict=True)
    )


def _of_another_size(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (mean, deviation) of two sites' numbers differ as numbers of other units do."""
    (a, s), (b, t) = sorted((one, other), key=lambda told: told[1])
    if s == 0:
        small, large = sorted((abs(a), abs(b)))
        return abs(a - b) > APART * t and large > TIMES * small
    return abs(a - b) > APART * s or t > SPREADS * s


def _sites(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
