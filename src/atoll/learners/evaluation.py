"""Parts: one model evaluated over several holders' examples in batches that cross their borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import Array
from atoll.data.examples import Examples, Task, joined
from atoll.learners.metrics import (
    Sums,
    add,
    classification_sums,
    regression_sums,
    token_sums,
)


def sums_of_parts(
    parts: Sequence[Examples],
    size: int,
    outputs_of: Callable[[NDArray[Any]], Array],
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
        while at < len(x):
            stop = min(int(ends[place]) - start, len(x))
            found[place].append(sums_of(outputs[at:stop], y[at:stop]))
            place, at = place + 1, stop
    return [add(sums) for sums in found]


def sums_of_outputs(
    outputs: NDArray[Any], y: NDArray[Any], loss: float, task: Task, classes: int | None
) -> Sums:
    """Sums of a batch of float32 outputs whose mean loss is `loss`, by the kind of task."""
    if task == "regression":
        return regression_sums(outputs, y, loss * len(y))
    if task == "tokens":
        return token_sums(outputs, y, loss * y.size)
    return classification_sums(outputs, y, loss * len(y), classes or 0)


def pieces(examples: Examples, size: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs and targets of `size` examples at a time."""
    for start in range(0, len(examples), size):
        yield examples.take(slice(start, start + size))


def mean_over(
    examples: Examples, size: int, loss_of: Callable[[NDArray[Any], NDArray[Any]], Any]
) -> float:
    """The mean loss over all examples, from the mean loss of `size` of them at a time."""
    total = sum(float(loss_of(x, y)) * len(x) for x, y in pieces(examples, size))
    return total / len(examples)
