"""Clip: bound how far one client can move the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from atoll.aggregation.stage import Stage
from atoll.errors import ConfigurationError
from atoll.keys import Key
from atoll.updates import Update
from atoll.vectors import Vectors


@dataclass(frozen=True)
class Clip(Stage):
    """Scale an update to an L2 norm of at most `norm`, over all its vectors together.

    McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, "flat
    clipping". Buffers and counters are not part of the norm and are not scaled. Measurements: the
    mean `update_norm` before clipping, and `clipped`, the fraction of clients that were scaled.
    """

    norm: float

    def __post_init__(self) -> None:
        if not (self.norm > 0 and math.isfinite(self.norm)):
            raise ConfigurationError(f"the clipping norm must be positive, not {self.norm}")

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        squares = sum(
            float(np.square(vector, dtype=np.float64).sum()) for vector in update.vectors.values()
        )
        norm = math.sqrt(squares)
        metrics = {**update.metrics, "update_norm": norm, "clipped": float(norm > self.norm)}
        vectors = update.vectors
        if norm > self.norm:
            scale = np.float32(self.norm / norm)
            vectors = {name: scale * vector for name, vector in vectors.items()}
        return replace(update, vectors=vectors, metrics=metrics), memory
