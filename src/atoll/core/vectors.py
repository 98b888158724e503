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
from dataclasses import dataclass
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
