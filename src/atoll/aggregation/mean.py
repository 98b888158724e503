"""Mean: the weighted average, as a running sum that is exact and therefore order-free."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.schema import WEIGHT_LIMIT, Schema, Spec
from atoll.aggregation.stage import Accumulator, Reducer, Rows, Setting, Stage
from atoll.aggregation.sums import ExactScalar, FixedSum, rounded, to_units
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Sender, Update
from atoll.core.vectors import Vectors, part, prefixed
from atoll.errors import ConfigurationError

logger = logging.getLogger("atoll")

#: A metric beyond this, infinite or NaN is left out of the round's means.
METRIC_LIMIT = 1e30


@dataclass(frozen=True)
class Mean(Reducer):
    """sum(weight * vector) / sum(weight), in O(model) memory and int64 fixed point.

    A vector that not everyone sent is divided by the weight of those who did. Float32 vectors stay
    float32; float64 and integer ones give their mean and their sum in float64, to 2^-40 of a unit
    for each update. A round without an update gives zeros of weight 0. Statistics are
    averaged with the same weights; counters stay integers (rounded half to even). Measurements: the
    mean over clients of every metric they report, and `float_fallback`, the vectors that were too
    large for fixed point and were summed in float64 instead.

    Args:
        heaviest: the greatest weight that is taken from one client, where clients say it
            themselves; an update with a greater one is refused.
    """

    heaviest: float | None = None

    def __post_init__(self) -> None:
        if self.heaviest is not None and not 0 < self.heaviest <= WEIGHT_LIMIT:
            raise ConfigurationError(f"heaviest must be positive, not {self.heaviest!r}")

    def bind(self, setting: Setting) -> Stage:
        if self.heaviest is not None and not setting.schema.weighted:
            raise ConfigurationError("heaviest is for weights that clients give; these are uniform")
        return self

    def sends(self, schema: Schema) -> Schema:
        least, most = schema.weights
        return replace(schema, weights=(least, min(most, self.heaviest or most)))

    def takes(self, schema: Schema) -> Schema:
        return self.sends(schema)

    def fewest(self) -> int:
        return 0

    def open(self, schema: Schema) -> Accumulator:
        return _RunningMean(schema)


class _RunningMean(Accumulator):
    takes_folds = True

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.sums = {name: FixedSum(spec.size) for name, spec in schema.vectors.items()}
        self.statistics = {
            name: FixedSum(spec.size)
            for name, spec in schema.statistics.items()
            if name != "counters"
        }
        # Counters are small whole numbers: Python integers cannot overflow and never round.
        self.counters = (
            np.zeros(schema.statistics["counters"].size, object)
            if "counters" in schema.statistics
            else None
        )
        self.weight = ExactScalar()
        #: What is missing of the weight behind a vector, because its share was not 1.
        self.less: dict[str, ExactScalar] = {}
        self.count = 0
        self.metrics: dict[str, tuple[ExactScalar, ExactScalar]] = {}

    def add(self, update: Update, sender: Sender) -> None:
        # Rounded once, so that numerator and denominator see the same weight.
        weight = rounded(update.weight)
        for name, total in self.sums.items():
            share = update.shares.get(name, 1.0)
            own = weight if share == 1 else rounded(weight * share)
            if own:
                total.add(update.vectors[name].reshape(-1), own)
            if own != weight:
                self.less.setdefault(name, ExactScalar()).add(weight - own)
        for name, total in self.statistics.items():
            total.add(update.statistics[name], weight)
        if self.counters is not None:
            self.counters += to_units(weight) * update.statistics["counters"].astype(object)
        self.weight.add(weight)
        self.count += 1
        self._measure({name: [value] for name, value in update.metrics.items()})

    def add_rows(self, rows: Rows) -> None:
        weights = [rounded(weight) for weight in rows.weights]
        for name, total in self.sums.items():
            if rows.folds is not None:
                total.add_units(*rows.folds[name])
            else:
                total.add_rows(rows.vectors[name].reshape(len(rows), -1), weights)
        for name, total in self.statistics.items():
            total.add_rows(rows.statistics[name], weights)
        if self.counters is not None:
            for weight, row in zip(weights, rows.statistics["counters"], strict=True):
                self.counters += to_units(weight) * row.astype(object)
        self.weight.add_all(weights)
        self.count += len(rows)
        self._measure(rows.metrics)

    def _measure(self, metrics: Mapping[str, Sequence[float]]) -> None:
        for name, column in metrics.items():
            values = [value for value in column if abs(value) < METRIC_LIMIT]
            if values:
                total, count = self.metrics.setdefault(name, (ExactScalar(), ExactScalar()))
                total.add_all(values)
                count.add(len(values))

    def merge(self, other: _RunningMean) -> None:
        for name, total in self.sums.items():
            total.merge(other.sums[name])
        for name, total in self.statistics.items():
            total.merge(other.statistics[name])
        if self.counters is not None:
            self.counters += other.counters
        self.weight.units += other.weight.units
        for name, less in other.less.items():
            self.less.setdefault(name, ExactScalar()).units += less.units
        self.count += other.count
        for name, (value, count) in other.metrics.items():
            mine = self.metrics.setdefault(name, (ExactScalar(), ExactScalar()))
            mine[0].units += value.units
            mine[1].units += count.units

    def fresh(self) -> Accumulator:
        return _RunningMean(self._schema)

    def state(self) -> Vectors:
        arrays: Vectors = {}
        for kind, sums in (("sums", self.sums), ("statistics", self.statistics)):
            for name, total in sums.items():
                arrays |= prefixed(f"{kind}/{name}/", total.state())
        # Integers of any size travel as digits.
        numbers = {
            "count": self.count,
            "weight": self.weight.units,
            "less": {name: less.units for name, less in self.less.items()},
            "counters": [] if self.counters is None else [int(total) for total in self.counters],
            "metrics": {n: [v.units, k.units] for n, (v, k) in self.metrics.items()},
        }
        arrays["numbers"] = np.frombuffer(json.dumps(numbers).encode(), np.uint8)
        return arrays

    def restore(self, state: Vectors) -> None:
        for kind, sums in (("sums", self.sums), ("statistics", self.statistics)):
            for name, total in sums.items():
                total.restore(part(f"{kind}/{name}/", state))
        numbers = json.loads(bytes(state["numbers"]))
        self.count, self.weight.units = numbers["count"], numbers["weight"]
        self.less = {name: ExactScalar(units) for name, units in numbers["less"].items()}
        if self.counters is not None:
            self.counters = np.array(numbers["counters"], object)
        for name, (value, count) in numbers["metrics"].items():
            self.metrics[name] = (ExactScalar(value), ExactScalar(count))

    def close(self, population: int, state: Vectors, key: Key) -> Aggregate:
        weight = self.weight.value()
        inexact = [name for name, total in self.sums.items() if not total.exact]
        for name in inexact:
            logger.warning(
                "%s holds values beyond 2^38; they were summed in float64, so the last bits depend "
                "on the order of arrival; the run is probably diverging",
                name,
            )
        measurements = {
            name: value.value() / count.value()
            for name, (value, count) in sorted(self.metrics.items())
        }
        behind = {name: weight - less.value() for name, less in self.less.items()}
        specs = self._schema.vectors
        exact = {
            name: total.value().reshape(specs[name].shape)
            for name, total in self.sums.items()
            if specs[name].dtype != "float32"
        }
        return Aggregate(
            {
                name: _mean(total, behind.get(name, weight), self._schema.vectors[name])
                for name, total in self.sums.items()
            },
            {name: total.quotient(weight or math.inf) for name, total in self.statistics.items()}
            | self._mean_counters(),
            weight=weight,
            count=self.count,
            population=population,
            measurements={**measurements, "float_fallback": float(len(inexact))},
            weights=behind,
            sums=exact,
        )

    def _mean_counters(self) -> Vectors:
        if self.counters is None:
            return {}
        units = self.weight.units or 1
        means = [_round_division(int(total), units) for total in self.counters]
        return {"counters": np.array(means, np.int64)}


def _mean(total: FixedSum, weight: float, spec: Spec) -> NDArray[np.floating]:
    """The mean of one vector; zeros where nobody sent it."""
    weight = weight if weight > 0 else math.inf
    narrow = spec.dtype == "float32"
    mean = total.quotient(weight) if narrow else total.value() / weight
    return mean.reshape(spec.shape)


def _round_division(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, halves to even, without floats."""
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))
