"""Download: the stages that a model goes through on its way from the server to its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import Schema, Spec
from atoll.aggregation.stage import Pipeline, Reducer, Sampling, Setting, Stage, stages_of
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Layout, Vectors
from atoll.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Download:
    """Bound stages for float32 vectors of the model's length; others go as they are."""

    stages: tuple[Stage, ...]
    schemas: tuple[Schema, ...]

    @staticmethod
    def bind(given: Stage | Pipeline, shared: Layout, sampling: Sampling) -> Download:
        """The stages as they work on one vector of the shared parameters."""
        stages = stages_of(given)
        schemas, bound = [Schema({"params": Spec((shared.size,))})], list[Stage]()
        for place, stage in enumerate(stages):
            if isinstance(stage, Reducer):
                raise ConfigurationError(f"a model goes down to each client: leave {stage!r} out")
            about = Setting(tuple(bound), stages[place + 1 :], schemas[-1], {}, shared, sampling)
            bound.append(stage.bind(about))
            if bound[-1].remember(schemas[-1]) or bound[-1].init(schemas[-1]):
                raise ConfigurationError(
                    f"{stage!r} keeps something from round to round, for which a download has no "
                    "place: leave its feedback out"
                )
            schemas.append(bound[-1].sends(schemas[-1]))
        return Download(tuple(bound), tuple(schemas))

    def encode(self, vectors: Vectors, key: Key) -> dict[str, Vectors]:
        """Vectors of the model's length as they travel, each by its name."""
        return {name: self._down(vector, key.fold(name)) for name, vector in vectors.items()}

    def decode(self, sent: Mapping[str, Vectors]) -> Vectors:
        """The vectors that clients work with."""
        return {name: self._up(parts) for name, parts in sent.items()}

    def fits(self, vector: NDArray[Any]) -> bool:
        """Whether a vector is one of those that go through the stages."""
        spec = self.schemas[0].vectors["params"]
        return vector.shape == spec.shape and vector.dtype == np.float32

    def _down(self, vector: NDArray[Any], key: Key) -> Vectors:
        update = Update({"params": vector})
        for place, stage in enumerate(self.stages):
            update, _ = stage.encode(update, {}, {}, key.fold("stage", place))
        return update.vectors

    def _up(self, parts: Vectors) -> NDArray[Any]:
        update = Update(parts)
        for place, stage in reversed(list(enumerate(self.stages))):
            update = stage.decode(update, self.schemas[place])
        return update.vectors["params"]
