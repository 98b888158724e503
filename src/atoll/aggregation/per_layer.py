"""PerLayer: other stages for other layers of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import Schema, Spec
from atoll.aggregation.stage import Reducer, Setting, Stage
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Tree, Vectors, flatten, nest
from atoll.errors import ConfigurationError, LayoutError


class PerLayer(Stage):
    """Cut vectors of the model's length by layer, and send each part its own way.

    `PerLayer(("conv*", TopK(0.01)), ("*.bias", Quantize(8)))`: the first pattern that an array's
    name matches decides; arrays that none matches go on as they are, and so do vectors of another
    length.
    """

    def __init__(self, *stages: tuple[str, Stage]) -> None:
        for pair in stages:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Stage)):
                raise ConfigurationError(
                    f"PerLayer takes pairs of a pattern and a stage, such as ('*.weight', "
                    f"Quantize(8)), not {pair!r}"
                )
            if isinstance(pair[1], Reducer):
                raise ConfigurationError(f"{pair[1]!r} makes one of many, and stands by itself")
        self.stages = stages

    def __repr__(self) -> str:
        return f"PerLayer({', '.join(map(repr, self.stages))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerLayer) and self.stages == other.stages

    def __hash__(self) -> int:
        return hash(self.stages)

    def bind(self, setting: Setting) -> Stage:
        shape = (setting.shared.size,)
        names = [n for n, spec in setting.schema.vectors.items() if spec.shape == shape]
        left = np.arange(setting.shared.size)
        parts: list[tuple[NDArray[np.int64], Stage]] = []
        for pattern, stage in self.stages:
            try:
                at = np.intersect1d(setting.shared.select(pattern), left)
            except LayoutError as error:
                raise ConfigurationError(f"{self!r}: {error}") from None
            left = np.setdiff1d(left, at)
            inner = replace(setting, schema=_cut(setting.schema, names, len(at)), bounds={})
            parts.append((at, stage.bind(inner)))
        return _PerLayer(tuple(names), (*parts, (left, _Through())))


class _Through(Stage):
    """As it is."""


@dataclass(frozen=True, eq=False)
class _PerLayer(Stage):
    """`parts` are positions in vectors `names`, and the stage for each."""

    names: tuple[str, ...]
    parts: tuple[tuple[NDArray[np.int64], Stage], ...]

    @property
    def secret(self) -> bool:  # type: ignore[override]
        return any(stage.secret for _, stage in self.parts)

    @property
    def lossy(self) -> bool:  # type: ignore[override]
        return any(stage.lossy for _, stage in self.parts)

    def _each(self, schema: Schema) -> Iterator[tuple[str, NDArray[np.int64], Stage, Schema]]:
        for number, (at, stage) in enumerate(self.parts):
            if len(at):
                yield str(number), at, stage, _cut(schema, self.names, len(at))

    def sends(self, schema: Schema) -> Schema:
        vectors = {n: spec for n, spec in schema.vectors.items() if n not in self.names}
        metrics = dict(schema.metrics)
        for number, _, stage, inner in self._each(schema):
            sent = stage.sends(inner)
            vectors |= {f"{name}.{number}": spec for name, spec in sent.vectors.items()}
            metrics |= sent.metrics
        return replace(schema, vectors=vectors, metrics=metrics)

    def init(self, schema: Schema) -> Vectors:
        return flatten({n: stage.init(inner) for n, _, stage, inner in self._each(schema)})

    def broadcast(self, state: Vectors) -> Vectors:
        tree = nest(state)
        told = {str(n): s.broadcast(tree.get(str(n), {})) for n, (_, s) in enumerate(self.parts)}
        return flatten(told)

    def remember(self, schema: Schema) -> Vectors:
        return flatten({n: stage.remember(inner) for n, _, stage, inner in self._each(schema)})

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        vectors = {n: v for n, v in update.vectors.items() if n not in self.names}
        metrics, kept = dict(update.metrics), Tree()
        tells, remembers = nest(told), nest(memory)
        for place, (at, stage) in enumerate(self.parts):
            number = str(place)
            if not len(at):
                continue
            own = {n: update.vectors[n][at] for n in self.names if n in update.vectors}
            sent, kept[number] = stage.encode(
                replace(update, vectors=own),
                tells.get(number, {}),
                remembers.get(number, {}),
                key.fold("part", place),
            )
            vectors |= {f"{name}.{number}": vector for name, vector in sent.vectors.items()}
            metrics |= sent.metrics
        return replace(update, vectors=vectors, metrics=metrics), flatten(kept)

    def decode(self, update: Update, schema: Schema) -> Update:
        whole = {n: np.empty(schema.vectors[n].shape, schema.vectors[n].dtype) for n in self.names}
        taken: set[str] = set()
        for number, at, stage, inner in self._each(schema):
            sent = {name: f"{name}.{number}" for name in stage.sends(inner).vectors}
            own = {name: update.vectors[long] for name, long in sent.items()}
            taken |= set(sent.values())
            part = stage.verify(stage.decode(replace(update, vectors=own), inner), {})
            for name in self.names:
                whole[name][at] = part.vectors[name]
        rest = {name: v for name, v in update.vectors.items() if name not in taken}
        return replace(update, vectors={**rest, **whole})


def _cut(schema: Schema, names: tuple[str, ...] | list[str], size: int) -> Schema:
    """The schema of one part: these vectors, so long, and no statistics."""
    vectors = {name: Spec((size,), schema.vectors[name].dtype) for name in names}
    return replace(schema, vectors=vectors, statistics={})
