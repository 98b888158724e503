"""An engine that lets tests look at turns, and disturb them."""

from __future__ import annotations

import numpy as np

from atoll.simulation import Backend, Engine, Sequential


class Tapped(Engine):
    """One client after the other in this thread; `tap` sees the turns of each group first."""

    def __init__(self, tap, each=lambda turn: None, shuffle=False):
        self.tap, self.each, self.shuffle = tap, each, shuffle

    def open(self, plan, data, key):
        inner = Sequential(workers=1).open(plan, data, key)
        tapped = self

        class TappedCrew(Backend):
            engine, notes = inner.engine, inner.notes

            def run(self, received, turns, sums):
                tapped.tap(turns)
                order = list(range(len(turns)))
                if tapped.shuffle:
                    order = np.random.default_rng().permutation(len(turns)).tolist()
                for place in order:
                    tapped.each(turns[place])
                    for block in inner.run(received, [turns[place]], sums):
                        yield [(place, delivery) for _, delivery in block]

            def close(self):
                inner.close()

        return TappedCrew()
