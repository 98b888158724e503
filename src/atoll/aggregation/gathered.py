"""Gathered: answers as they are, by sender, for rules that must see each of them."""

from __future__ import annotations

import json

import numpy as np

from atoll.aggregation.stage import Accumulator
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Sender, Update
from atoll.core.vectors import Vectors, flatten, nest


class Gathered(Accumulator):
    """O(model * clients) memory. `answers` are in the order of their senders, not of arrival."""

    def __init__(self) -> None:
        self._answers: dict[Sender, Update] = {}

    @property
    def answers(self) -> dict[Sender, Update]:
        """Every answer by its sender."""
        return dict(sorted(self._answers.items()))

    def __getitem__(self, sender: Sender) -> Vectors:
        return self._answers[sender].vectors

    def add(self, update: Update, sender: Sender) -> None:
        self._answers[sender] = Update(
            {name: np.array(vector) for name, vector in update.vectors.items()},
            update.weight,
            {name: np.array(vector) for name, vector in update.statistics.items()},
            dict(update.metrics),
            dict(update.shares),
        )

    def merge(self, other: Gathered) -> None:
        self._answers |= other._answers

    def fresh(self) -> Gathered:
        return Gathered()

    def state(self) -> Vectors:
        about = [
            [*sender, answer.weight, dict(answer.metrics), dict(answer.shares)]
            for sender, answer in self._answers.items()
        ]
        rows = {
            str(place): {"vectors": answer.vectors, "statistics": answer.statistics}
            for place, answer in enumerate(self._answers.values())
        }
        return {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), **flatten(rows)}

    def restore(self, state: Vectors) -> None:
        state = dict(state)
        about = json.loads(bytes(state.pop("about")))
        rows = nest(state)
        for place, (client, task, weight, metrics, shares) in enumerate(about):
            row = rows.get(str(place), {})
            self._answers[client, task] = Update(
                row.get("vectors", {}), weight, row.get("statistics", {}), metrics, shares
            )

    def close(self, population: int, state: Vectors, key: Key) -> Aggregate:
        raise NotImplementedError("gathered answers have no aggregate of their own")
