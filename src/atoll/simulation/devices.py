"""Devices: how fast, how well connected and how reliable simulated clients are.

All draws are keyed by seed, client, round and attempt, so a run meets the same devices again.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atoll.core.numbers import at_least_zero, positive, value_is_real
from atoll.core.random import Key
from atoll.errors import DataError
from atoll.rounds.roster import Members, Resources


def device_key(key: Key, name: str) -> Key:
    """The key of everything that is drawn about one client's device."""
    return key.fold("device", name)


@dataclass(frozen=True, slots=True)
class Conditions:
    """One device in one round.

    `seconds_per_step` is its time for a local step, `down` and `up` are bytes per second (infinity
    for no limit), `latency` is seconds per message, `drops` whether it vanishes before delivering.
    """

    seconds_per_step: float = 0.0
    down: float = math.inf
    up: float = math.inf
    latency: float = 0.0
    drops: bool = False

    def transfer(self, down_bytes: int, up_bytes: int) -> float:
        """Seconds to receive and to send."""
        return 2 * self.latency + down_bytes / self.down + up_bytes / self.up


class Devices:
    """A population of devices; this base is the ideal one: no delay, always there."""

    def conditions(self, name: str, planned_steps: int, own: Key, today: Key) -> Conditions:
        """The conditions of client `name` when its full work is `planned_steps`.

        Draws from `own` stay the same for the whole run; `today` has new ones at each attempt.
        """
        return Conditions()

    def present(self, names: Sequence[str], now: float, key: Key) -> Members | None:
        """Members that can be invited at time `now`; None for all."""
        return None

    def resources(self, names: Sequence[str], key: Key) -> Resources | None:
        """What devices report about themselves, for selection; None if they do not."""
        return None

    def next_change(self, now: float) -> float | None:
        """A later time at which other members may be present; None if that never changes."""
        return None


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """A positive quantity: exp(Normal(log(median), sigma))."""

    median: float
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not (self.median > 0 and self.sigma >= 0):
            raise DataError("a log-normal's median must be positive and its sigma not negative")

    def draw(self, rng: np.random.Generator) -> float:
        return self.median * math.exp(self.sigma * rng.standard_normal())


@dataclass(frozen=True, kw_only=True)
class RandomDevices(Devices):
    """Devices drawn from distributions.

    Args:
        steps_per_second: of local training, drawn once per client.
        down, up: bytes per second, drawn once per client; None for no limit.
        latency: seconds per message.
        jitter: sigma of a log-normal factor on the compute time, drawn anew in each round.
        dropout: probability that an invited client vanishes before it delivers.
        availability: probability that a client can be invited in a given `period`.
        charging, unmetered: shares of clients that report so.
        period: seconds for which a client's availability stays the same.
    """

    steps_per_second: LogNormal = LogNormal(median=10.0, sigma=0.5)
    down: LogNormal | None = None
    up: LogNormal | None = None
    latency: float = 0.0
    jitter: float = 0.0
    dropout: float = 0.0
    availability: float = 1.0
    charging: float = 1.0
    unmetered: float = 1.0
    period: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("dropout", "availability", "charging", "unmetered"):
            value = getattr(self, name)
            if not (value_is_real(value) and 0 <= value <= 1):
                raise DataError(f"{name} must be a probability, not {value!r}")
        at_least_zero("latency", self.latency, DataError)
        at_least_zero("jitter", self.jitter, DataError)
        positive("period", self.period, DataError)

    def conditions(self, name: str, planned_steps: int, own: Key, today: Key) -> Conditions:
        always = own.generator()
        speed = self.steps_per_second.draw(always)
        down = math.inf if self.down is None else self.down.draw(always)
        up = math.inf if self.up is None else self.up.draw(always)
        now = today.generator()
        slow = math.exp(self.jitter * now.standard_normal())
        return Conditions(slow / speed, down, up, self.latency, bool(now.random() < self.dropout))

    def present(self, names: Sequence[str], now: float, key: Key) -> Members | None:
        if self.availability >= 1:
            return None
        rng = key.fold("availability", int(now // self.period)).generator()
        return np.flatnonzero(rng.random(len(names)) < self.availability)

    def next_change(self, now: float) -> float | None:
        return None if self.availability >= 1 else (now // self.period + 1) * self.period

    def resources(self, names: Sequence[str], key: Key) -> Resources:
        rng = key.fold("resources").generator()
        charging = rng.random(len(names)) < self.charging
        unmetered = rng.random(len(names)) < self.unmetered
        speed = [self.steps_per_second.draw(key.fold("device", name).generator()) for name in names]
        return Resources(charging, unmetered, np.array(speed))


@dataclass(frozen=True, kw_only=True)
class Stragglers(Devices):
    """FedProx's systems heterogeneity (Li et al., MLSys 2020, section 5.2).

    At each attempt a `share` of the clients can do only part of their work within `seconds`: a
    number of `epochs` uniform on 1 to epochs - 1. The others do all of it in that time.
    """

    share: float = 0.9
    epochs: int = 20
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.epochs < 2:
            raise DataError("share must be a probability and epochs at least 2")

    def conditions(self, name: str, planned_steps: int, own: Key, today: Key) -> Conditions:
        rng = today.generator()
        possible = rng.integers(1, self.epochs) if rng.random() < self.share else self.epochs
        return Conditions(self.seconds / planned_steps * self.epochs / float(possible))


@dataclass(frozen=True)
class Trace:
    """What was recorded of one device: when it was there, how fast and how well connected.

    `intervals` are (start, end) in seconds; with a `period`, they repeat.
    """

    intervals: tuple[tuple[float, float], ...]
    steps_per_second: float = math.inf
    down: float = math.inf
    up: float = math.inf

    def __post_init__(self) -> None:
        merged: list[tuple[float, float]] = []
        for start, end in sorted(self.intervals):
            if not start < end:
                raise DataError(f"a device cannot be there from {start} to {end}")
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        object.__setattr__(self, "intervals", tuple(merged))
        if not all(rate > 0 for rate in (self.steps_per_second, self.down, self.up)):
            raise DataError("a device's speeds must be positive")


@dataclass(frozen=True, eq=False)
class TracedDevices(Devices):
    """Devices that behave as recorded; a client that leaves before it delivers drops out."""

    traces: Mapping[str, Trace]
    period: float | None = None

    @staticmethod
    def read(path: str | Path, period: float | None = None) -> TracedDevices:
        """From a CSV file with a header and the columns client, start, end and, optionally,
        steps_per_second, down and up; several rows per client are several intervals."""
        intervals: dict[str, list[tuple[float, float]]] = {}
        rates: dict[str, tuple[float, ...]] = {}
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    client = row["client"]
                    intervals.setdefault(client, []).append(
                        (float(row["start"]), float(row["end"]))
                    )
                    rates[client] = tuple(
                        float(row.get(name) or math.inf)
                        for name in ("steps_per_second", "down", "up")
                    )
        except KeyError as error:
            raise DataError(
                f"{path} has no column {error}; it needs client, start and end"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read as a device trace: {error}") from error
        return TracedDevices(
            {
                client: Trace(tuple(sorted(parts)), *rates[client])
                for client, parts in intervals.items()
            },
            period,
        )

    def trace(self, name: str) -> Trace:
        try:
            return self.traces[name]
        except KeyError:
            raise DataError(f"the device trace has no client {name!r}") from None

    def conditions(self, name: str, planned_steps: int, own: Key, today: Key) -> Conditions:
        trace = self.trace(name)
        return Conditions(1 / trace.steps_per_second, trace.down, trace.up)

    def present(self, names: Sequence[str], now: float, key: Key) -> Members | None:
        there = [self.leaves(name, now) is not None for name in names]
        return np.flatnonzero(there)

    def leaves(self, name: str, now: float) -> float | None:
        """When a client that is there at `now` leaves; None if it is not there."""
        moment = now if self.period is None else now % self.period
        intervals = self.trace(name).intervals
        for start, end in intervals:
            if start <= moment < end:
                if end != self.period or intervals[0][0] > 0:
                    return now + end - moment
                # It stays over the turn of the period.
                return math.inf if start == 0 else now + end - moment + intervals[0][1]
        return None

    def next_change(self, now: float) -> float | None:
        moment = now if self.period is None else now % self.period
        edges = sorted(
            {edge for t in self.traces.values() for pair in t.intervals for edge in pair}
        )
        later = [edge for edge in edges if edge > moment]
        if later:
            return now + later[0] - moment
        return None if self.period is None or not edges else now + self.period - moment + edges[0]
