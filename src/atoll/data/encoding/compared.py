"""One column as all sites tell of it: what they do not agree on, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

import numpy as np

from atoll.data.encoding.columns import Amounts, Categories, Classes, Numbers
from atoll.data.encoding.summary import ColumnSummary, pooled
from atoll.data.encoding.values import in_order, is_number, letters
from atoll.errors import DataError, shown

Missing = Literal["refuse", "indicator"]
Unknown = Literal["refuse", "zeros"]
#: Means that are so many of the smaller deviations apart, or deviations that are so many times as
#: large, may be of another unit; of constants, means that are so many times as large.
APART, SPREADS, TIMES = 3.0, 5.0, 3.0
#: Whole numbers of no more different values may be codes, as 1 and 2 for 0 and 1.
CODED = 3


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What people have decided where sites differ."""

    columns: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    units: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()
    leave_out: frozenset[str] = frozenset()


class Compared:
    """What the sites tell of one column."""

    def __init__(
        self, name: str, sites: Mapping[str, ColumnSummary], called: tuple[str, ...],
        decided: Decisions, label: bool,
    ) -> None:  # fmt: skip
        self.name, self.sites, self.called, self.label = name, sites, called, label
        self.noun = f"{'label' if label else 'column'} {name!r}"
        self.same = dict(decided.values.get(name, {}))
        self.factors = dict(decided.units.get(name, {}))
        self.alike = name in decided.alike
        kinds = {told.kind for told in sites.values()}
        self.categories = "categories" in kinds or bool(self.same)
        #: A label of few whole numbers, counted in nothing: a class here is one at other sites too.
        self._classes = label and all(
            (told.values or told.rare) and not told.unit for told in sites.values()
        )
        codes = [code for told in sites.values() for code in told.no_value]
        self.no_value = tuple(dict.fromkeys(codes))

    def faults(self, unknown: Unknown) -> list[str]:
        """What the sites do not agree on."""
        worded = self.categories or self._classes
        found = [*self._faults_of_codes()]
        found += self._faults_of_categories() if worded else self._faults_of_numbers()
        held = {value for told in self.sites.values() for value in told.values}
        stray = sorted(set(self.same) - held)
        rare = [site for site, told in self.sites.items() if told.rare]
        if stray and not rare:
            found.append(f"values says {shown(stray)} of {self.noun}, which no site holds")
        if rare and self.categories and unknown == "refuse" and not (self.alike or stray):
            found.append(
                f"{self.noun} holds values at {listed(rare)} that too few rows hold to be told, so "
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
                    f"{self.noun} is numbers at {site} and categories at {listed(words)}: bring it "
                    f"into one form, or leave_out=[{self.name!r}]"
                )
                return
        if any(told.unit for told in self.sites.values()):
            yield f"{self.noun} has a unit at one site, and categories at another"
        vocabularies = {site: self._vocabulary(told) for site, told in self.sites.items()}
        empty = [site for site, values in vocabularies.items() if not values]
        if empty:
            yield (
                f"{self.noun} has no value at {listed(empty)} that is held by enough rows to be "
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
        if task == "regression" and self.categories:
            raise DataError(f"{self.noun} is no amount at every site, but task='regression'")
        if task == "classification" and not (self.categories or self._classes):
            raise DataError(f"{self.noun} has fractions or many values, but is to be classes")
        if self.categories or (self._classes and task != "regression"):
            values, same = self._values()
            return Classes(called=self.called, no_value=self.no_value, values=values, same=same)
        return Amounts(
            called=self.called, no_value=self.no_value, unit=self.unit,
            units=self.factors, width=next(iter(self.sites.values())).width,
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


def listed(names: Sequence[str]) -> str:
    """Names for a sentence: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
