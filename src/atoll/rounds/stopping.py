"""Stopping: rules that end a run before its last round, simulated and served alike.

A rule looks at the rounds so far, and nothing else, so it ends both at the same round.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from atoll.core.numbers import at_least_zero, positive, value_is_real, whole
from atoll.errors import ConfigurationError
from atoll.learners.metrics import main_metric, more_is_better


class Round(Protocol):
    """What rules read of a closed round."""

    @property
    def round(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def measurements(self) -> Mapping[str, float]: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...
    @property
    def clock(self) -> float: ...


class StopRule(ABC):
    """Says when enough is enough."""

    @abstractmethod
    def reason(self, history: Sequence[Round]) -> str:
        """Why the run ends after these rounds, in words; empty if it goes on."""

    def check(self, names: Collection[str]) -> None:
        """Raise `ConfigurationError` if it waits for a metric that is not among these."""

    def knowing(self, own: Mapping[str, bool]) -> StopRule:
        """The same rule where it is known which way the learner's own metrics are good."""
        return self


@dataclass(frozen=True)
class Patience(StopRule):
    """Stop when a metric has not improved for so many rounds.

    Args:
        rounds: evaluated or not; the model of the best round is kept beside the final one.
        metric: None is accuracy, or the loss where there is none.
        least: an improvement by less than this counts for none.
        higher: whether more is better; None knows it of atoll's own metrics and the learner's.
    """

    rounds: int
    metric: str | None = None
    least: float = 0.0
    higher: bool | None = None

    def __post_init__(self) -> None:
        whole("the rounds of Patience", self.rounds, 1)
        at_least_zero("the least improvement", self.least)

    def reason(self, history: Sequence[Round]) -> str:
        metric = self.metric or _first_metric(history)
        best, since = math.nan, 0
        for record in history:
            value = _value(record, metric)
            if value is None or math.isnan(value):
                continue
            score = value if better_high(metric, self.higher) else -value
            if math.isnan(best) or score > best + self.least:
                best, since = score, record.round
        waited = history[-1].round - since if history and not math.isnan(best) else 0
        return f"{metric} has not improved for {waited} rounds" if waited >= self.rounds else ""

    def check(self, names: Collection[str]) -> None:
        # A loss in training is no figure that one waits for without having said so.
        _check_reported(self, self.metric or main_metric({*names} - {"train_loss"}), names)

    def knowing(self, own: Mapping[str, bool]) -> Patience:
        return replace(self, higher=_told(self.metric, self.higher, own))


@dataclass(frozen=True)
class Target(StopRule):
    """Stop when a metric reaches a value: from below where more is better, else from above."""

    metric: str
    value: float
    higher: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not value_is_real(self.value):
            raise ConfigurationError(
                f"Target takes a metric's name and a number, not {self.metric!r}, {self.value!r}"
            )

    def reason(self, history: Sequence[Round]) -> str:
        found = _value(history[-1], self.metric) if history else None
        if found is None or math.isnan(found):
            return ""
        high = better_high(self.metric, self.higher)
        reached = found >= self.value if high else found <= self.value
        return f"{self.metric} has reached {found:.4g}" if reached else ""

    def check(self, names: Collection[str]) -> None:
        _check_reported(self, self.metric, names)

    def knowing(self, own: Mapping[str, bool]) -> Target:
        return replace(self, higher=_told(self.metric, self.higher, own))


@dataclass(frozen=True)
class Hours(StopRule):
    """Stop when so many hours have passed: simulated ones in a simulation, real ones if served."""

    hours: float

    def __post_init__(self) -> None:
        positive("hours", self.hours)

    def reason(self, history: Sequence[Round]) -> str:
        passed = history[-1].clock / 3600 if history else 0.0
        return f"{passed:.2f} hours have passed" if passed >= self.hours else ""


@dataclass(frozen=True)
class Bytes(StopRule):
    """Stop when clients have sent and received so many bytes together."""

    bytes: int

    def __post_init__(self) -> None:
        whole("bytes", self.bytes, 1)

    def reason(self, history: Sequence[Round]) -> str:
        moved = sum(record.bytes_up + record.bytes_down for record in history)
        return f"{moved} bytes have been moved" if moved >= self.bytes else ""


def check_rules(rules: Sequence[StopRule], names: Collection[str]) -> None:
    """Raise `ConfigurationError` if a rule waits for a metric that rounds do not have."""
    for rule in rules:
        rule.check(names)


def only(names: Collection[str]) -> str:
    """What rounds have, in a sentence."""
    if names:
        return f"rounds have {', '.join(sorted(names))}"
    return "no round is evaluated, because nobody has test data for it"


def _check_reported(rule: StopRule, metric: str, names: Collection[str]) -> None:
    if metric not in names:
        raise ConfigurationError(
            f"{type(rule).__name__} waits for {metric!r}, which is in no round: {only(names)}"
        )


def stop_reason(rules: Sequence[StopRule], history: Sequence[Round]) -> str:
    """Why a run ends now, by the first rule that says so; empty if it goes on."""
    return next((reason for rule in rules if (reason := rule.reason(history))), "")


def better_high(metric: str, higher: bool | None = None) -> bool:
    """Whether more of a metric is better."""
    return more_is_better(metric) if higher is None else higher


def _told(metric: str | None, higher: bool | None, own: Mapping[str, bool]) -> bool | None:
    """Whether more of a metric is better, where that was said of the metric or of the rule."""
    if higher is not None or metric is None or metric.partition("_client_")[0] not in own:
        return higher
    return more_is_better(metric, own)


def _value(record: Round, metric: str) -> float | None:
    return record.metrics.get(metric, record.measurements.get(metric))


def _first_metric(history: Sequence[Round]) -> str:
    return main_metric({name for record in history for name in record.metrics})
