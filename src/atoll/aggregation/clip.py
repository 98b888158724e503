"""Clip: bound how far one client can move the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from atoll.aggregation.pipeline import Pipeline
from atoll.aggregation.stage import Stage
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Vectors
from atoll.errors import ConfigurationError


@dataclass(frozen=True)
class Clip(Stage):
    """Scale an update to an L2 norm of at most `norm`, over the vectors `only` names together.

    McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, "flat
    clipping". Buffers and counters are not part of the norm and are not scaled. Measurements: the
    mean `update_norm` before clipping, and `clipped`, the fraction of clients that were scaled.

    Args:
        norm: the largest norm that passes.
        only: names of the vectors to clip. An algorithm that reports several (SCAFFOLD) must have
            it said: scaled control variates are no longer those that clients remember.
    """

    norm: float
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not (self.norm > 0 and math.isfinite(self.norm)):
            raise ConfigurationError(f"the clipping norm must be positive, not {self.norm}")

    def check(self, pipeline: Pipeline, reports: Sequence[str], weighted: bool) -> None:
        if self.only is None and len(reports) > 1:
            raise ConfigurationError(
                f"updates hold {' and '.join(reports)}; say which of them to clip, e.g. "
                f"Clip({self.norm}, only={(reports[0],)!r})"
            )
        unknown = set(self.only or ()) - set(reports)
        if unknown:
            raise ConfigurationError(
                f"there is no {sorted(unknown)[0]!r} to clip; updates hold {', '.join(reports)}"
            )

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        names = self.only or tuple(update.vectors)
        squares = sum(
            float(np.square(update.vectors[name], dtype=np.float64).sum()) for name in names
        )
        norm = math.sqrt(squares)
        metrics = {**update.metrics, "update_norm": norm, "clipped": float(norm > self.norm)}
        vectors = update.vectors
        if norm > self.norm:
            # A hair below: rounding to float32 must not leave the norm above the bound.
            scale = np.float32(self.norm / norm * (1 - 2**-22))
            vectors = {**vectors, **{name: scale * vectors[name] for name in names}}
        return replace(update, vectors=vectors, metrics=metrics), memory
