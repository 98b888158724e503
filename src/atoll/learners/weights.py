"""Weights that come from people's own objects and go back into them, checked name by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import SECTIONS, Layout, Vectors
from atoll.errors import ConfigurationError, LayoutError

#: So many names are listed in a sentence; the rest are counted.
LISTED = 3
#: Fewer numbers than this say too little of who has drawn them.
MANY = 64
#: Of more numbers than these a part is looked at.
SAMPLED = 1 << 16


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


def sampled(array: NDArray[Any]) -> NDArray[Any]:
    """A copy of some of an array's numbers, spread over it; of all of them if they are few."""
    flat = array.reshape(-1)
    return np.array(flat[:: max(1, flat.size // SAMPLED)])


def unlike(given: NDArray[Any], draws: Sequence[NDArray[Any]]) -> str:
    """Why an array cannot be one more of these draws of its initialiser; empty if it can.

    Constants must be equal. Of many random numbers the largest and their size are compared, with
    bounds that fresh ones pass all but surely (once in 10^9).
    """
    if all(np.array_equal(draws[0], each) for each in draws[1:]):
        return "" if np.array_equal(given, draws[0]) else "is not what its initialiser sets"
    if not np.isfinite(given).all():
        return "is not finite"
    drawn = np.concatenate([each.ravel() for each in draws]).astype(np.float64)
    if given.size < MANY:
        return ""
    square = float(np.square(drawn).mean())
    # The fourth moment over the second's square is 1.8 of uniform numbers and 3 of normal ones.
    bounded = float(np.mean(drawn**4)) < 2.2 * square**2
    largest = float(np.abs(drawn).max()) * 10 ** (9 / len(drawn))
    if bounded and float(np.abs(given).max()) > largest:
        return "has values that its initialiser does not draw"
    spread = 8 / np.sqrt(2 * given.size) * np.sqrt(1 + 1 / len(draws))
    size = float(np.square(given.astype(np.float64)).mean()) / square
    if abs(np.sqrt(size) - 1) > spread:
        return "has values of another size than its initialiser draws"
    return ""
