"""What travels from a client to the server, and what the server makes of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from atoll.core.vectors import Vectors

#: Whose update it is, and by which of this client's tasks it was made.
Sender = tuple[str, int]
#: For groups of vectors: the L2 norm that all vectors of a group can have together, at most.
Bounds = Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Update:
    """One client's contribution to one round.

    `vectors` are named and shaped as the algorithm `reports` them and may be clipped, compressed
    and noised. `statistics` are the changes of `buffers` and `counters`, which are only averaged.
    `weight` is this update's weight in the mean; `shares` names the vectors that count with a part
    of it only, in [0, 1], a vector with share 0 being left out. `metrics` are figures about the
    local work. For a stack of C clients arrays have a leading axis, and numbers are columns.
    """

    vectors: Vectors
    weight: Any = 1.0
    statistics: Vectors = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """What the pipeline made of a round's updates; `aggregate["delta"]` reads a vector.

    `count` updates of total `weight` came from a population of `population` clients; `weights` has
    the weight behind those vectors that not every update counted fully for, and `sums` the sums of
    those that are not float32, where they are known exactly. `bounds` is how far one update can
    have moved it, where stages see to that.
    """

    vectors: Vectors
    statistics: Vectors
    weight: float
    count: int
    population: int
    measurements: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=dict)
    sums: Vectors = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.vectors[name]

    @property
    def participation(self) -> float:
        """|S| / N, the share of the population in this aggregate."""
        return self.count / self.population

    def share(self, name: str) -> float:
        """The part of the weight that stands behind a vector: 0 if nobody sent it."""
        return self.weights.get(name, self.weight) / self.weight if self.weight else 0.0

    def sum(self, name: str) -> NDArray[Any]:
        """The weighted sum of a vector, rather than its mean: float64."""
        if name in self.sums:
            return self.sums[name]
        total: NDArray[Any] = self.vectors[name].astype(float) * self.weights.get(name, self.weight)
        return total
