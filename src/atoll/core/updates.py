"""What travels from a client to the server, and what the server makes of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from atoll.core.vectors import Vectors


@dataclass(frozen=True)
class Update:
    """One client's contribution to one round.

    `vectors` are named by the algorithm (`delta` [P], ...) and may be clipped, compressed and
    noised. `statistics` are the changes of `buffers` and `counters`, which are only averaged.
    `weight` is this update's share in the mean. `metrics` are figures about the local work.
    """

    vectors: Vectors
    weight: float = 1.0
    statistics: Vectors = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """What the pipeline made of a round's updates; `aggregate["delta"]` reads a vector.

    `count` updates of total `weight` came from a population of `population` clients.
    """

    vectors: Vectors
    statistics: Vectors
    weight: float
    count: int
    population: int
    measurements: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.vectors[name]

    @property
    def participation(self) -> float:
        """|S| / N, the share of the population in this aggregate."""
        return self.count / self.population
