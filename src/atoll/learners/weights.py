"""Weights that come from people's own objects and go back into them, checked name by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import SECTIONS, Layout, Vectors
from atoll.errors import ConfigurationError, LayoutError

#: So many names are listed in a sentence; the rest are counted.
LISTED = 3


def is_vectors(source: Any) -> bool:
    """Whether this looks like a model's sections, rather than arrays by name."""
    return (
        isinstance(source, Mapping)
        and bool(source)
        and set(source) <= set(SECTIONS)
        and all(getattr(vector, "ndim", 0) == 1 for vector in source.values())
    )


def copied(layout: Layout, vectors: Mapping[str, NDArray[Any]]) -> Vectors:
    """A copy of a model's sections; a `ConfigurationError` if they are another layout's."""
    found = {name: np.array(vector) for name, vector in vectors.items()}
    try:
        layout.check(found)
    except LayoutError as error:
        raise ConfigurationError(str(error)) from error
    return found


def packed(
    layout: Layout, arrays: Mapping[str, Any], what: str, known: Collection[str] = ()
) -> Vectors:
    """A model of named arrays; `what` they are of, and the `known` names that do not travel."""
    fits(layout, arrays, what, known)
    try:
        return layout.pack({entry.name: arrays[entry.name] for entry in layout.entries})
    except LayoutError as error:
        raise ConfigurationError(f"{what} does not fit the model: {error}") from error


def fits(layout: Layout, arrays: Mapping[str, Any], what: str, known: Collection[str] = ()) -> None:
    """Raise `ConfigurationError` unless each array of the layout is there, in its shape."""
    missing = [entry.name for entry in layout.entries if entry.name not in arrays]
    wrong = [
        f"{entry.name} is {list(np.shape(arrays[entry.name]))} and not {list(entry.shape)}"
        for entry in layout.entries
        if entry.name in arrays and tuple(np.shape(arrays[entry.name])) != entry.shape
    ]
    own = {entry.name for entry in layout.entries}
    unknown = [name for name in arrays if name not in own and name not in known]
    faults = [
        f"{said} {_listed(names)}"
        for said, names in (
            ("it has no", missing), ("shapes differ:", wrong), ("the model has no", unknown)
        )
        if names
    ]  # fmt: skip
    if faults:
        raise ConfigurationError(f"{what} does not fit the model: {'; '.join(faults)}")


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
