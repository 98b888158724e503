"""Layout: a model's named arrays on one side, flat vectors on the other.

A model is up to three vectors, its *sections*:

- `params`: float32 [P], what is trained, clipped, noised and stepped;
- `buffers`: float32 [B], statistics such as BatchNorm's running mean: averaged, nothing else;
- `counters`: int64 [K], integer state such as `num_batches_tracked`: exact, never a float.

Everything between the learners works on these vectors and knows no framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.errors import LayoutError

#: An array of any framework; algorithms use only operators on it, so [P] and [C, P] both work.
Array = Any
Vector = NDArray[np.float32]
Vectors = dict[str, NDArray[Any]]
#: Nested dicts of arrays: what is one owner's is under one name.
Tree = dict[str, Any]
Section = Literal["params", "buffers", "counters"]

SECTIONS: dict[Section, np.dtype[Any]] = {
    "params": np.dtype(np.float32),
    "buffers": np.dtype(np.float32),
    "counters": np.dtype(np.int64),
}
#: The sections that only plain averaging may touch.
STATISTICS: tuple[Section, ...] = ("buffers", "counters")


@dataclass(frozen=True, slots=True)
class Entry:
    """One named array of the model and where it lies in its section."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    section: Section
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Layout:
    """The order, shapes and dtypes of a model's arrays inside its flat vectors."""

    entries: tuple[Entry, ...]

    @staticmethod
    def of(parameters: Mapping[str, Array], buffers: Mapping[str, Array] | None = None) -> Layout:
        """The layout of named arrays (anything with `shape` and `dtype`), in their given order.

        Floating-point buffers go to `buffers`; integer and boolean ones to `counters`.
        """
        ends: dict[Section, int] = dict.fromkeys(SECTIONS, 0)
        entries = []
        for group, arrays in (("parameter", parameters), ("buffer", buffers or {})):
            for name, array in arrays.items():
                dtype = str(array.dtype).removeprefix("torch.")
                floating = "float" in dtype
                if group == "parameter" and not floating:
                    raise LayoutError(
                        f"parameter {name!r} has dtype {dtype}; parameters are trained and "
                        "must be floating point, so register it as a buffer instead"
                    )
                if "complex" in dtype:
                    raise LayoutError(
                        f"{name!r} has dtype {dtype}; complex arrays are not supported"
                    )
                section: Section = (
                    "params" if group == "parameter" else "buffers" if floating else "counters"
                )
                shape = tuple(int(side) for side in array.shape)
                entries.append(Entry(name, shape, dtype, section, ends[section]))
                ends[section] += math.prod(shape)
        names = [entry.name for entry in entries]
        if len(set(names)) != len(names):
            raise LayoutError("two arrays of the model have the same name")
        return Layout(tuple(entries))

    @cached_property
    def sizes(self) -> dict[Section, int]:
        """Length of each section that is not empty, in their fixed order."""
        totals = {
            section: sum(entry.size for entry in self.entries if entry.section == section)
            for section in SECTIONS
        }
        return {section: size for section, size in totals.items() if size}

    @property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return self.sizes.get("params", 0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names, shapes, dtypes and sections: equal at two parties that agree."""
        plan = [[e.name, list(e.shape), e.dtype, e.section] for e in self.entries]
        return sha256(json.dumps(plan, separators=(",", ":")).encode()).hexdigest()

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(self._by_name) or "nothing"
            raise LayoutError(f"the layout has no array {name!r}; it has {known}") from None

    @cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def select(self, *patterns: str, section: Section = "params") -> NDArray[np.int64]:
        """Positions [S] in `section` of every array whose name matches a shell-style pattern."""
        chosen = [
            entry
            for entry in self.entries
            if entry.section == section and any(fnmatchcase(entry.name, p) for p in patterns)
        ]
        if not chosen:
            raise LayoutError(f"no array of section {section!r} matches {', '.join(patterns)}")
        return np.concatenate([np.arange(e.start, e.start + e.size) for e in chosen])

    def zeros(self) -> Vectors:
        """A model of zeros."""
        return {section: np.zeros(size, SECTIONS[section]) for section, size in self.sizes.items()}

    def pack(self, arrays: Mapping[str, Any]) -> Vectors:
        """Copy named arrays into new flat vectors; names and shapes must be the layout's."""
        extra = set(arrays) - set(self._by_name)
        if extra:
            raise LayoutError(f"arrays that the layout does not know: {', '.join(sorted(extra))}")
        vectors = self.zeros()
        for entry in self.entries:
            if entry.name not in arrays:
                raise LayoutError(f"array {entry.name!r} is missing")
            array = np.asarray(arrays[entry.name])
            if array.shape != entry.shape:
                raise LayoutError(
                    f"array {entry.name!r} has shape {array.shape}, the layout says {entry.shape}"
                )
            if entry.section == "counters" and array.dtype.kind not in "iub":
                raise LayoutError(f"counter {entry.name!r} must be integer, not {array.dtype}")
            vectors[entry.section][entry.slice] = array.reshape(-1)
        return vectors

    def unpack(self, vectors: Mapping[str, Array]) -> dict[str, Array]:
        """Named views into the vectors ([..., size] becomes [..., *shape]); no copy, no cast."""
        return {
            entry.name: vectors[entry.section][..., entry.slice].reshape(
                (*vectors[entry.section].shape[:-1], *entry.shape)
            )
            for entry in self.entries
        }

    def check(self, vectors: Mapping[str, NDArray[Any]]) -> None:
        """Raise `LayoutError` unless these are this layout's sections, shapes and dtypes."""
        if set(vectors) != set(self.sizes):
            raise LayoutError(
                f"the model has sections {describe_names(self.sizes)}, "
                f"but {describe_names(vectors)} were given"
            )
        for section, size in self.sizes.items():
            check_vector(section, vectors[section], (size,), SECTIONS[section])


@dataclass(frozen=True)
class Split:
    """A layout in two: what is `shared` travels, what is `private` stays with each client."""

    whole: Layout
    shared: Layout
    private: Layout

    @staticmethod
    def of(whole: Layout, patterns: Iterable[str]) -> Split:
        """Arrays whose names match a shell-style pattern are private, others are shared."""
        patterns = tuple(patterns)
        for pattern in patterns:
            if not any(fnmatchcase(entry.name, pattern) for entry in whole.entries):
                names = ", ".join(entry.name for entry in whole.entries[:8])
                raise LayoutError(f"no array of the model matches {pattern!r}; it has {names}, ...")
        own = [e for e in whole.entries if any(fnmatchcase(e.name, p) for p in patterns)]
        rest = [entry for entry in whole.entries if entry not in own]
        return Split(whole, _rebased(rest), _rebased(own))

    @property
    def trivial(self) -> bool:
        """Whether everything is shared."""
        return not self.private.entries

    @cached_property
    def places(self) -> dict[Section, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each section: positions of the shared and of the private values in the whole."""
        own = {entry.name for entry in self.private.entries}
        found: dict[Section, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for section in self.whole.sizes:
            entries = [entry for entry in self.whole.entries if entry.section == section]
            found[section] = (
                _positions(entry for entry in entries if entry.name not in own),
                _positions(entry for entry in entries if entry.name in own),
            )
        return found

    def parts(self, model: Mapping[str, NDArray[Any]]) -> tuple[Vectors, Vectors]:
        """A whole model as its shared and its private sections; empty ones are left out."""
        if self.trivial:
            return {section: model[section] for section in self.whole.sizes}, {}
        shared: Vectors = {}
        private: Vectors = {}
        for section, (ours, own) in self.places.items():
            if len(ours):
                shared[section] = model[section][..., ours] if len(own) else model[section]
            if len(own):
                private[section] = model[section][..., own]
        return shared, private

    def merged(self, shared: Mapping[str, Any], private: Mapping[str, Any]) -> Vectors:
        """Sections of the whole model from both parts; either may have a leading axis [C, ...]."""
        if self.trivial:
            return {section: shared[section] for section in self.whole.sizes}
        whole: Vectors = {}
        for section, (ours, own) in self.places.items():
            both = ((ours, shared), (own, private))
            parts = [(at, given[section]) for at, given in both if len(at)]
            lead = max((values.shape[:-1] for _, values in parts), key=len)
            whole[section] = np.empty((*lead, len(ours) + len(own)), SECTIONS[section])
            for at, values in parts:
                whole[section][..., at] = values
        return whole


def _positions(entries: Iterable[Entry]) -> NDArray[np.int64]:
    ranges = [np.arange(entry.start, entry.start + entry.size) for entry in entries]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def _rebased(entries: Iterable[Entry]) -> Layout:
    """The entries as a layout of their own, one after the other in each section."""
    ends: dict[Section, int] = dict.fromkeys(SECTIONS, 0)
    moved = []
    for entry in entries:
        moved.append(replace(entry, start=ends[entry.section]))
        ends[entry.section] += entry.size
    return Layout(tuple(moved))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Vectors:
    """Arrays of nested dicts by their paths, e.g. {"algorithm/params": ...}."""
    flat: Vectors = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def nest(vectors: Mapping[str, NDArray[Any]]) -> Tree:
    """Nested dicts from arrays by their paths; the reverse of `flatten`, but for empty dicts."""
    tree: Tree = {}
    for path, vector in vectors.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = vector
    return tree


def describe_names(names: Iterable[str]) -> str:
    """Names as a sentence lists them."""
    return ", ".join(sorted(names)) or "none"


def check_vector(
    name: str, vector: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Raise `LayoutError` unless `vector` has this shape and dtype."""
    if vector.shape != shape or vector.dtype != dtype:
        raise LayoutError(
            f"{name!r} must be {dtype} {list(shape)}, not {vector.dtype} {list(vector.shape)}"
        )


def prefixed(prefix: str, vectors: Mapping[str, Array]) -> dict[str, Array]:
    """The vectors under names that begin with `prefix`."""
    return {prefix + name: vector for name, vector in vectors.items()}


def part(prefix: str, vectors: Mapping[str, Array]) -> dict[str, Array]:
    """The vectors whose names begin with `prefix`, under the rest of their names."""
    return {
        name.removeprefix(prefix): vector
        for name, vector in vectors.items()
        if name.startswith(prefix)
    }
