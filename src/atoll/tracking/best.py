"""Which round's model is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

from atoll.learners.metrics import main_metric, more_is_better
from atoll.tracking.record import Record


class Best:
    """The best round so far; of rounds that are alike, the first.

    Args:
        metric: what decides; None is accuracy or, without one, loss.
        own: whether more is better, of people's own metrics.
    """

    def __init__(self, metric: str | None, own: Mapping[str, bool]) -> None:
        self.metric, self.own = metric, own
        self.record: Record | None = None
        self._score = -math.inf

    def note(self, record: Record) -> bool:
        """Whether this round is the best now."""
        if record.metrics and self.metric is None:
            # One metric throughout: figures of two cannot be compared.
            self.metric = main_metric(record.metrics)
        metric = self.metric or ""
        value = record.metrics.get(metric, math.nan)
        score = value if more_is_better(metric, self.own) else -value
        better = not math.isnan(score) and (self.record is None or score > self._score)
        if better:
            self.record, self._score = record, score
        return better
