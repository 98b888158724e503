"""Batches: which examples each client of a cohort takes in each of its local steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import permutations


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of C clients over S steps, S being the most that any of them takes.

    `positions` [C, S, B] are places among each client's own examples; `counts` [C, S] says how many
    of the B are real (0 once a client has finished), the others repeat one that is.
    """

    positions: NDArray[np.int64]
    counts: NDArray[np.int64]


def batches(
    words: Sequence[int],
    sizes: Sequence[int],
    steps: Sequence[int],
    cut: Callable[[int], Sequence[slice]],
) -> Batches:
    """Every client goes over its examples in a new random order in each epoch.

    `words` key the orders, `cut` says where an epoch over so many examples is cut into batches.
    """
    cuts = {size: cut(size) for size in set(sizes)}
    most = max(part.stop - part.start for parts in cuts.values() for part in parts)
    positions = np.zeros((len(sizes), max(steps), most), np.int64)
    counts = np.zeros((len(sizes), max(steps)), np.int64)
    for size, parts in cuts.items():
        members = [c for c, each in enumerate(sizes) if each == size]
        needed = max(steps[c] for c in members)
        epochs = -(-needed // len(parts))
        orders = permutations([words[c] for c in members], size, epochs)
        template = np.stack([np.minimum(p.start + np.arange(most), p.stop - 1) for p in parts])
        lengths = np.array([part.stop - part.start for part in parts])
        walks = orders[:, :, template].reshape(len(members), epochs * len(parts), most)
        taken = np.array([steps[c] for c in members])
        walking = np.arange(needed) < taken[:, None]
        positions[members, :needed] = walks[:, :needed] * walking[:, :, None]
        counts[members, :needed] = np.tile(lengths, epochs)[:needed] * walking
    return Batches(positions, counts)
