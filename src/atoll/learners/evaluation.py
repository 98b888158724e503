"""Parts: one model evaluated over several holders' examples in batches that cross their borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import Array
from atoll.data.examples import Examples, joined
from atoll.data.sums import Sums, add

#: Examples whose targets are whole numbers for each of many places (tokens) in one batch.
TOKENS_AT_ONCE = 64


def sums_of_parts(
    parts: Sequence[Examples],
    size: int,
    outputs_of: Callable[[Any], Array],
    sums_of: Callable[[Array, NDArray[Any]], Sums],
) -> list[Sums]:
    """Sums over each of these parts, none of them empty, from outputs of `size` inputs at a time.

    Rows of outputs must not depend on what other rows are in a batch.
    """
    whole = joined(parts)
    ends = np.cumsum([len(part) for part in parts])
    found: list[list[Sums]] = [[] for _ in parts]
    for start in range(0, len(whole), size):
        x, y = whole.take(slice(start, start + size))
        outputs = outputs_of(x)
        # The parts that have examples in this batch, and which of its rows are theirs.
        place, at = int(np.searchsorted(ends, start, side="right")), 0
        while at < len(y):
            stop = min(int(ends[place]) - start, len(y))
            found[place].append(sums_of(outputs[at:stop], y[at:stop]))
            place, at = place + 1, stop
    return [add(sums) for sums in found]


def pieces(examples: Examples, size: int) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Inputs and targets of `size` examples at a time."""
    for start in range(0, len(examples), size):
        yield examples.take(slice(start, start + size))


def mean_over(
    examples: Examples,
    size: int,
    loss_of: Callable[[Any, NDArray[Any]], Any],
    weight_of: Callable[[NDArray[Any]], int] = len,
) -> float:
    """The mean loss over all examples, from the mean loss of `size` of them at a time.

    `weight_of` says how many of the targets count; 0.0 if none does.
    """
    total, weights = 0.0, 0
    for x, y in pieces(examples, size):
        weight = weight_of(y)
        total += float(loss_of(x, y)) * weight if weight else 0.0
        weights += weight
    return total / max(weights, 1)
