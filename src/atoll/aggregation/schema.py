"""Schema: what an update must hold; names, shapes, dtypes and ranges, and nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import SECTIONS, STATISTICS, Layout
from atoll.errors import ConfigurationError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: Lighter updates would lose digits in fixed point, heavier ones would not fit it.
WEIGHT_LEAST, WEIGHT_LIMIT = 2.0**-20, 2.0**40
DTYPES = ("float32", "float64", "int64", "int32", "int8", "uint8", "uint16", "uint32")


@dataclass(frozen=True)
class Spec:
    """One array: its shape and dtype; an `optional` one may be left out of an update (share 0)."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    optional: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"arrays are {', '.join(DTYPES)}, not {self.dtype!r}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    def zeros(self) -> NDArray[np.generic]:
        """An array of this kind."""
        return np.zeros(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


#: A kind of array as people write it: a length, a shape, or all of it.
Shape = int | tuple[int, ...] | Spec


def specs(shapes: Mapping[str, Shape]) -> dict[str, Spec]:
    """Kinds of arrays by name; `ConfigurationError` for names that cannot travel."""
    found = {}
    for name, shape in shapes.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise ConfigurationError(
                f"{name!r} cannot be the name of a vector: use up to 64 letters, digits, _ . and -"
            )
        if isinstance(shape, Spec):
            found[name] = shape
        else:
            found[name] = Spec((shape,) if isinstance(shape, int) else tuple(shape))
    return found


@dataclass(frozen=True)
class Schema:
    """What an update must hold.

    `weights` are the least and the greatest weight; (1, 1) where updates count alike. `metrics`
    says which figures may leave a client, and between which numbers they lie.
    """

    vectors: Mapping[str, Spec]
    statistics: Mapping[str, Spec] = field(default_factory=dict)
    weights: tuple[float, float] = (WEIGHT_LEAST, WEIGHT_LIMIT)
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @staticmethod
    def of(shapes: Mapping[str, Shape], shared: Layout | None = None, **more: object) -> Schema:
        """From shapes by name and, for models with statistics, the layout of what is shared."""
        sizes = {} if shared is None else shared.sizes
        statistics = {
            str(name): Spec((sizes[name],), str(SECTIONS[name]))
            for name in STATISTICS
            if name in sizes
        }
        return Schema(specs(shapes), statistics, **more)  # type: ignore[arg-type]

    def sent_as(self, message: Schema) -> Schema:
        """What becomes of this schema, where what may be left out stays so under its name."""
        kept = {
            name: replace(spec, optional=spec.optional or self.vectors[name].optional)
            if name in self.vectors
            else spec
            for name, spec in message.vectors.items()
        }
        return replace(message, vectors=kept)

    @property
    def weighted(self) -> bool:
        return self.weights[0] != self.weights[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.nbytes for spec in (*self.vectors.values(), *self.statistics.values()))
