"""Meaning: what a data set's inputs and label stand for, by name, compared between sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from atoll.data.examples import Inputs

#: So many names are shown of those that differ.
SHOWN = 8


@dataclass(frozen=True)
class Meaning:
    """What each input is, in order, each class, and the label; empty where nobody says.

    Models of two sites whose meanings differ cannot be averaged: the same weight would be of one
    thing here and of another there.
    """

    inputs: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    target: str = ""

    @staticmethod
    def of(x: Inputs, columns: Sequence[str], classes: Sequence[str], target: str) -> Meaning:
        """That of inputs, by their own names where no columns are said."""
        named = tuple(x) if isinstance(x, dict) and not columns else tuple(columns)
        return Meaning(named, tuple(classes), target)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.classes or self.target)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all names and their order."""
        state = sha256()
        for names in (self.inputs, self.classes, (self.target,) if self.target else ()):
            state.update(f"{len(names)}\n".encode())
            for name in names:
                state.update(f"{len(name)} {name}\n".encode())
        return state.hexdigest()

    def difference(self, other: Meaning, here: str, there: str) -> str:
        """How this meaning, of `here`, differs from another, in words; empty if it does not."""
        found = [
            _differ(noun, mine, theirs, here, there)
            for noun, mine, theirs in (
                ("inputs", self.inputs, other.inputs), ("classes", self.classes, other.classes),
            )
        ]  # fmt: skip
        if self.target != other.target:
            found.append(f"the label is {self.target!r} at {here} and {other.target!r} at {there}")
        return "; ".join(filter(None, found))


def _differ(noun: str, mine: Sequence[str], theirs: Sequence[str], here: str, there: str) -> str:
    if tuple(mine) == tuple(theirs):
        return ""
    if sorted(mine) == sorted(theirs):
        return (
            f"the {noun} stand in another order: {_listed(mine)} at {here}, {_listed(theirs)} at "
            f"{there}"
        )
    parts = []
    for own, others, place in ((mine, theirs, here), (theirs, mine, there)):
        only = [name for name in own if name not in others]
        if only:
            parts.append(f"only {place} has {_listed(only)}")
    return f"the {noun} differ: {' and '.join(parts) or 'some are there twice'}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
