"""PerLayer: other stages for other layers of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import Schema, Spec
from atoll.aggregation.stage import Reducer, Setting, Stage
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Bounds, Update
from atoll.core.vectors import Tree, Vectors, flatten, nest
from atoll.errors import ConfigurationError, LayoutError, UpdateRefused

#: How one part of a message is brought back by its stage.
Back = Callable[[Stage, Update, Schema], Update]


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

    @property
    def hides_metrics(self) -> bool:  # type: ignore[override]
        return any(stage.hides_metrics for _, stage in self.parts)

    def _each(self, schema: Schema) -> Iterator[tuple[str, NDArray[np.int64], Stage, Schema]]:
        for number, at, stage in self._there():
            yield number, at, stage, _cut(schema, self.names, len(at))

    def _there(self) -> Iterator[tuple[str, NDArray[np.int64], Stage]]:
        """The parts that have any entries, by number."""
        for number, (at, stage) in enumerate(self.parts):
            if len(at):
                yield str(number), at, stage

    def sends(self, schema: Schema) -> Schema:
        vectors = {n: spec for n, spec in schema.vectors.items() if n not in self.names}
        metrics = dict(schema.metrics)
        for number, _, stage, inner in self._each(schema):
            sent = inner.sent_as(stage.sends(inner))
            vectors |= {f"{name}.{number}": spec for name, spec in sent.vectors.items()}
            metrics |= {
                f"{name}.{number}": ends
                for name, ends in sent.metrics.items()
                if name not in schema.metrics
            }
        return replace(schema, vectors=vectors, metrics=metrics)

    def bound(self, bounds: Bounds, state: Vectors) -> Bounds:
        """All parts of a vector together, if each of them is bounded."""
        squares, tree = 0.0, nest(state)
        for number, _, stage in self._there():
            groups = stage.bound({}, tree.get(number, {}))
            whole = [norm for names, norm in groups.items() if set(self.names) <= set(names)]
            squares += min(whole, default=math.inf) ** 2
        return {} if math.isinf(squares) else {self.names: math.sqrt(squares)}

    def init(self, schema: Schema) -> Vectors:
        return flatten({n: stage.init(inner) for n, _, stage, inner in self._each(schema)})

    def broadcast(self, state: Vectors) -> Vectors:
        tree = nest(state)
        return flatten({n: stage.broadcast(tree.get(n, {})) for n, _, stage in self._there()})

    def remember(self, schema: Schema) -> Vectors:
        return flatten({n: stage.remember(inner) for n, _, stage, inner in self._each(schema)})

    def encode(
        self, update: Update, told: Vectors, memory: Vectors, key: Key
    ) -> tuple[Update, Vectors]:
        vectors = {n: v for n, v in update.vectors.items() if n not in self.names}
        shares = {n: s for n, s in update.shares.items() if n not in self.names}
        metrics, kept = dict(update.metrics), Tree()
        tells, remembers = nest(told), nest(memory)
        for number, at, stage in self._there():
            own = {n: update.vectors[n][at] for n in self.names if n in update.vectors}
            sent, kept[number] = stage.encode(
                replace(update, vectors=own),
                tells.get(number, {}),
                remembers.get(number, {}),
                key.fold("part", int(number)),
            )
            vectors |= {f"{name}.{number}": vector for name, vector in sent.vectors.items()}
            shares |= {f"{n}.{number}": s for n, s in sent.shares.items() if n in self.names}
            new = {n: v for n, v in sent.metrics.items() if n not in update.metrics}
            metrics |= {f"{name}.{number}": value for name, value in new.items()}
        return replace(update, vectors=vectors, shares=shares, metrics=metrics), flatten(kept)

    def decode(self, update: Update, schema: Schema) -> Update:
        return self._joined(update, schema, lambda stage, own, inner: stage.decode(own, inner))

    def _joined(self, update: Update, schema: Schema, back: Back) -> Update:
        """The parts of a message put together again, each brought back by its own stage."""
        parts: dict[str, list[tuple[NDArray[np.int64], NDArray[Any]]]] = {}
        taken, shares = set[str](), dict[str, float]()
        told: dict[str, set[float]] = {}
        for number, at, stage, inner in self._each(schema):
            long = {f"{name}.{number}": name for name in stage.sends(inner).vectors}
            own = {short: update.vectors[n] for n, short in long.items() if n in update.vectors}
            mine = {short: update.shares[n] for n, short in long.items() if n in update.shares}
            taken |= set(long)
            shares |= {name: share for name, share in mine.items() if name in self.names}
            for name in set(inner.vectors) & set(self.names):
                told.setdefault(name, set()).add(mine.get(name, 1.0))
            found = back(stage, replace(update, vectors=own, shares=mine), inner)
            for name, vector in found.vectors.items():
                parts.setdefault(name, []).append((at, vector))
        vectors = {n: v for n, v in update.vectors.items() if n not in taken}
        shares |= {n: s for n, s in update.shares.items() if n not in taken}
        for name, pieces in parts.items():
            spec = schema.vectors[name]
            if len(told.get(name, ())) > 1 or sum(len(at) for at, _ in pieces) != spec.size:
                raise UpdateRefused(f"{name!r} came without some of its parts, or not equally")
            vectors[name] = np.empty(spec.shape, spec.dtype)
            for at, piece in pieces:
                vectors[name][at] = piece
        return replace(update, vectors=vectors, shares=shares)

    def verify(self, update: Update, told: Vectors) -> Update:
        vectors, tells = dict(update.vectors), nest(told)
        there = [name for name in self.names if name in vectors]
        for number, at, stage in self._there():
            own = replace(update, vectors={name: update.vectors[name][at] for name in there})
            found = stage.verify(own, tells.get(number, {}))
            for name in there:
                if found.vectors[name] is not own.vectors[name]:
                    vectors[name] = vectors[name].copy()
                    vectors[name][at] = found.vectors[name]
        return replace(update, vectors=vectors)

    def release(self, aggregate: Aggregate, state: Vectors, key: Key) -> tuple[Aggregate, Vectors]:
        tree, kept = nest(state), Tree()
        vectors, measurements = dict(aggregate.vectors), dict(aggregate.measurements)
        for number, at, stage in self._there():
            own = replace(
                aggregate,
                vectors={name: vectors[name][at] for name in self.names if name in vectors},
            )
            found, kept[number] = stage.release(
                own, tree.get(number, {}), key.fold("part", int(number))
            )
            for name, piece in found.vectors.items():
                vectors[name] = vectors[name].copy()
                vectors[name][at] = piece
            new = {n: v for n, v in found.measurements.items() if n not in measurements}
            measurements |= {f"{name}.{number}": value for name, value in new.items()}
        return replace(aggregate, vectors=vectors, measurements=measurements), flatten(kept)


def _cut(schema: Schema, names: tuple[str, ...] | list[str], size: int) -> Schema:
    """The schema of one part: these vectors, so long, and no statistics."""
    vectors = {
        name: Spec((size,), schema.vectors[name].dtype, schema.vectors[name].optional)
        for name in names
    }
    return replace(schema, vectors=vectors, statistics={})
