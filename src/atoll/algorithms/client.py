"""The client as an algorithm sees it: what `work` may do where the data are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import STATISTICS, Array, Vectors
from atoll.data.examples import Examples
from atoll.learners.base import Assignment, Correction, Learner, LocalResult


@dataclass
class Client:
    """One client at work in one round.

    `model` is the received model, `statistics` what the client's work changed in its buffers and
    counters. Both stay out of the algorithm's sight: it handles parameters.
    """

    learner: Learner
    examples: Examples
    model: Vectors
    assignment: Assignment
    statistics: Vectors = field(default_factory=dict)

    @property
    def count(self) -> Any:
        """How many examples the client holds."""
        return len(self.examples)

    def train(self, params: Array, correction: Correction | None = None) -> LocalResult:
        """The local loop from `params` along `correction(gradient, params)`."""
        local = self.learner.train(self._at(params), self.examples, self.assignment, correction)
        self._keep(local.statistics)
        return local

    def gradient(self, params: Array, *, keep_statistics: bool = False) -> Array:
        """The gradient [P] of the client's mean loss at `params`."""
        gradient, statistics = self.learner.gradient(
            self._at(params), self.examples, self.assignment.key
        )
        if keep_statistics:
            self._keep(statistics)
        return gradient

    def _at(self, params: Array) -> Vectors:
        return {**self.model, "params": self.learner.asnumpy(params)}

    def _keep(self, statistics: dict[str, Any]) -> None:
        self.statistics = {
            section: _change(statistics[section], self.model[section])
            for section in STATISTICS
            if section in statistics
        }


def _change(after: NDArray[Any], before: NDArray[Any]) -> NDArray[Any]:
    """The difference, also where both are the same infinity (as in attention masks)."""
    with np.errstate(invalid="ignore"):
        return np.where(after == before, np.zeros_like(after), after - before)
