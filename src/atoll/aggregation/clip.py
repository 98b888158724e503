"""Clip: bound how far one client can move the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import Schema
from atoll.aggregation.stage import Setting, Stage
from atoll.core import room
from atoll.core.random import Key
from atoll.core.updates import Bounds, Update
from atoll.core.vectors import Vectors
from atoll.errors import ConfigurationError, UpdateRefused

#: A hair below: rounding to float32 must not leave the norm above the bound.
HAIR = 2.0**-22
#: What rounding on the way may add to a norm.
SLACK = 1e-5


@dataclass(frozen=True)
class Clip(Stage):
    """Scale an update to an L2 norm of at most `norm`, over the vectors `only` names together.

    McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, "flat
    clipping". Buffers and counters are not part of the norm and are not scaled. Measurements: the
    mean `update_norm` before clipping, and `clipped`, the fraction of clients that were scaled.
    The server refuses an update beyond the norm; where a later stage at clients loses something
    (quantisation, say), it clips once more instead.

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

    def bind(self, setting: Setting) -> Stage:
        reports = [n for n, spec in setting.schema.vectors.items() if spec.dtype == "float32"]
        if setting.at_server:
            raise ConfigurationError(
                f"{self!r} bounds what one client sends, so it stands before the reducer"
            )
        if self.only is None and len(setting.schema.vectors) > 1:
            raise ConfigurationError(
                f"updates hold {' and '.join(setting.schema.vectors)}; say which of them to clip, "
                f"e.g. Clip({self.norm}, only={tuple(reports[:1])!r})"
            )
        unknown = set(self.only or ()) - set(reports)
        if unknown:
            raise ConfigurationError(
                f"there is no {sorted(unknown)[0]!r} to clip; updates hold {', '.join(reports)}"
            )
        return _Bound(self.norm, self.only or tuple(reports), setting.lossy)


@dataclass(frozen=True)
class _Bound(Stage):
    """Clip where it stands: `again` says that the server clips once more."""

    norm: float
    names: tuple[str, ...]
    again: bool

    def sends(self, schema: Schema) -> Schema:
        more = {"update_norm": (0.0, math.inf), "clipped": (0.0, 1.0)}
        return replace(schema, metrics={**schema.metrics, **more})

    def bound(self, bounds: Bounds, state: Vectors) -> Bounds:
        return {**bounds, self.names: self.norm}

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        norm = l2_norm(update, self.names)
        metrics = {**update.metrics, "update_norm": norm, "clipped": float(norm > self.norm)}
        return replace(self._within(update, norm), metrics=metrics), memory

    def verify(self, update: Update, told: Vectors) -> Update:
        norm = l2_norm(update, self.names)
        if norm > self.norm * (1 + SLACK) and not self.again:
            raise UpdateRefused(
                f"{' and '.join(self.names)} has norm {norm:.6g}, but updates are clipped to "
                f"{self.norm:g}"
            )
        return self._within(update, norm)

    def _within(self, update: Update, norm: float) -> Update:
        if norm <= self.norm:
            return update
        scale = np.float32(self.norm / norm * (1 - HAIR))
        scaled = {
            name: scale * update.vectors[name] for name in self.names if name in update.vectors
        }
        return replace(update, vectors={**update.vectors, **scaled})


def l2_norm(update: Update, names: Iterable[str]) -> float:
    """The L2 norm of these vectors together; those that were left out count as zeros."""
    there = [update.vectors[name] for name in names if name in update.vectors]
    return math.sqrt(sum(_square(vector) for vector in there))


def _square(vector: NDArray[np.floating]) -> float:
    """The sum of squares; of a large vector piece by piece, which client and server do alike."""
    if vector.nbytes < room.LARGE:
        return float(np.square(vector, dtype=np.float64).sum())
    flat = vector.reshape(-1)
    parts = (flat[start:stop] for start, stop in room.pieces(len(flat), flat.itemsize))
    return math.fsum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
