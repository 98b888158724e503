"""Mean: the weighted average, as a running sum that is exact and therefore order-free."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.stage import Accumulator, Reducer, Schema
from atoll.aggregation.sums import ExactScalar, FixedSum, rounded, to_units
from atoll.core.updates import Aggregate, Update
from atoll.core.vectors import Vectors, part, prefixed
from atoll.errors import RunError

logger = logging.getLogger("atoll")

#: A metric beyond this, infinite or NaN is left out of the round's means.
METRIC_LIMIT = 1e30


@dataclass(frozen=True)
class Mean(Reducer):
    """sum(weight * vector) / sum(weight), in O(model) memory and int64 fixed point.

    Statistics are averaged with the same weights; counters stay integers (rounded half to even).
    Measurements: the mean over clients of every metric they report, and `float_fallback`, the
    vectors that were too large for fixed point and were summed in float64 instead.
    """

    def open(self, schema: Schema) -> Accumulator:
        return _RunningMean(schema)


class _RunningMean(Accumulator):
    takes_folds = True

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.sums = {name: FixedSum(size) for name, size in schema.vectors.items()}
        self.statistics = {
            name: FixedSum(size) for name, size in schema.statistics.items() if name != "counters"
        }
        # Counters are small whole numbers: Python integers cannot overflow and never round.
        self.counters = (
            np.zeros(schema.statistics["counters"], object)
            if "counters" in schema.statistics
            else None
        )
        self.weight = ExactScalar()
        self.count = 0
        self.metrics: dict[str, tuple[ExactScalar, ExactScalar]] = {}

    def add(self, update: Update) -> None:
        self._count(update, 1)

    def add_rows(
        self,
        vectors: Vectors,
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
        passed: Sequence[bool],
    ) -> None:
        chosen = [c for c, admitted in enumerate(passed) if admitted]
        if len(chosen) < len(passed):
            vectors = {name: rows[chosen] for name, rows in vectors.items()}
            statistics = {name: rows[chosen] for name, rows in statistics.items()}
        weights = [weights[c] for c in chosen]
        shares = [rounded(weight) for weight in weights]
        for name, total in self.sums.items():
            total.add_rows(vectors[name], shares)
        columns = {name: [column[c] for c in chosen] for name, column in metrics.items()}
        self._add_rest(statistics, shares, columns)

    def add_folds(
        self,
        folds: Mapping[str, tuple[NDArray[np.int64], int]],
        statistics: Vectors,
        weights: Sequence[float],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        for name, total in self.sums.items():
            total.add_units(*folds[name])
        self._add_rest(statistics, [rounded(weight) for weight in weights], metrics)

    def _add_rest(
        self, statistics: Vectors, shares: list[float], metrics: Mapping[str, Sequence[float]]
    ) -> None:
        for name, total in self.statistics.items():
            total.add_rows(statistics[name], shares)
        if self.counters is not None:
            for share, row in zip(shares, statistics["counters"], strict=True):
                self.counters += to_units(share) * row.astype(object)
        self.weight.add_all(shares)
        self.count += len(shares)
        for name, column in metrics.items():
            values = [value for value in column if abs(value) < METRIC_LIMIT]
            total_value, count = self.metrics.setdefault(name, (ExactScalar(), ExactScalar()))
            total_value.add_all(values)
            count.add(len(values))

    def withdraw(self, update: Update) -> None:
        self._count(update, -1)

    def _count(self, update: Update, sign: int) -> None:
        # Rounded once, so that numerator and denominator see the same weight.
        weight = rounded(update.weight)
        for name, total in self.sums.items():
            total.add(update.vectors[name], weight, sign)
        for name, total in self.statistics.items():
            total.add(update.statistics[name], weight, sign)
        if self.counters is not None:
            units = to_units(weight)
            self.counters += sign * units * update.statistics["counters"].astype(object)
        self.weight.add(weight, sign)
        self.count += sign
        for name, value in update.metrics.items():
            if abs(value) < METRIC_LIMIT:
                total_value, count = self.metrics.setdefault(name, (ExactScalar(), ExactScalar()))
                total_value.add(value, sign)
                count.add(1, sign)

    def merge(self, other: Accumulator) -> None:
        assert isinstance(other, _RunningMean)
        for name, total in self.sums.items():
            total.merge(other.sums[name])
        for name, total in self.statistics.items():
            total.merge(other.statistics[name])
        if self.counters is not None:
            self.counters += other.counters
        self.weight.units += other.weight.units
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
            "counters": [] if self.counters is None else [int(total) for total in self.counters],
            "metrics": {n: [v.units, k.units] for n, (v, k) in self.metrics.items()},
        }
        arrays["numbers"] = np.array([*json.dumps(numbers).encode()], np.int64)
        return arrays

    def restore(self, state: Vectors) -> None:
        for kind, sums in (("sums", self.sums), ("statistics", self.statistics)):
            for name, total in sums.items():
                total.restore(part(f"{kind}/{name}/", state))
        numbers = json.loads(bytes(state["numbers"].tolist()))
        self.count, self.weight.units = numbers["count"], numbers["weight"]
        if self.counters is not None:
            self.counters = np.array(numbers["counters"], object)
        for name, (value, count) in numbers["metrics"].items():
            self.metrics[name] = (ExactScalar(value), ExactScalar(count))

    def close(self, population: int) -> Aggregate:
        weight = self.weight.value()
        if self.count < 1 or not weight > 0:
            raise RunError("there is nothing to average: no update was accepted")
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
            if count.units
        }
        return Aggregate(
            {name: total.quotient(weight) for name, total in self.sums.items()},
            {name: total.quotient(weight) for name, total in self.statistics.items()}
            | self._mean_counters(),
            weight=weight,
            count=self.count,
            population=population,
            measurements={**measurements, "float_fallback": float(len(inexact))},
        )

    def _mean_counters(self) -> Vectors:
        if self.counters is None:
            return {}
        units = self.weight.units
        means = [_round_division(int(total), units) for total in self.counters]
        return {"counters": np.array(means, np.int64)}


def _round_division(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, halves to even, without floats."""
    quotient, remainder = divmod(numerator, denominator)
    twice = 2 * remainder
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))
