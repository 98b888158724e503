"""What a site remembers: of the update that counted last, and of the questions of an open round.

Files under two folders of the agent's: memory/ by the assignment that made it, kept/ by assignment
and question. What was made for an update that never counted goes as soon as another one counts.
"""

from __future__ import annotations

import logging
from pathlib import Path

from atoll.core import files
from atoll.core.random import Key
from atoll.core.vectors import Tree, Vectors, flatten, nest
from atoll.protocol.messages import Order
from atoll.rounds.plan import Plan
from atoll.rounds.task import Received, first_state

logger = logging.getLogger("atoll.site")


class Memory:
    """One site's memory of one federation."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._plan = plan
        self._folder, self._questions = folder / "memory", folder / "kept"
        for place in (self._folder, self._questions):
            place.mkdir(parents=True, exist_ok=True)

    def state(self, order: Order, received: Received) -> Tree:
        """What this site keeps: of the update that counted last, and of the open round.

        A question that is put twice finds what was kept before it was answered.
        """
        assert order.assignment is not None
        state = self._remembered(order, received)
        mine = [self._kept(order.assignment, exchange) for exchange in range(order.exchange)]
        now = self._kept(order.assignment, order.exchange)
        for other in self._questions.glob("*.safetensors"):
            if other not in (*mine, now):
                other.unlink()
        there = [path for path in mine if path.exists()]
        kept = files.load(there[-1], "kept")[1] if there else {}
        return {**state, "kept": kept} if kept else state

    def judged(self, order: Order, received: Received) -> Tree:
        """What this site's own model is made with: the memory that counts, and nothing goes."""
        path = None if order.memory is None else self._of(order.memory)
        return self._read(path, order, received)

    def keep(self, order: Order, before: Tree, after: Tree) -> None:
        """Write down what was answered to this order: for good, and under "kept" for the round."""
        assert order.assignment is not None
        lasting = {name: part for name, part in after.items() if name != "kept"}
        kept = after.get("kept", {})
        if kept or before.get("kept"):
            files.save(self._kept(order.assignment, order.exchange), "kept", {}, kept)
        if order.works:
            files.save(self._of(order.assignment), "memory", {}, flatten(lasting))

    def counted(self, order: Order) -> Path | None:
        """Where the memory is that counts, if any is; others go, but one in the making."""
        path = None if order.memory is None else self._of(order.memory)
        own = self._of(order.assignment or "")
        for other in self._folder.glob("*.safetensors"):
            if other not in (path, own):
                other.unlink()
        return path

    def _remembered(self, order: Order, received: Received) -> Tree:
        """What is remembered of the update that counted last; older files go."""
        path = self.counted(order)
        if not (order.works or order.owner == "algorithm"):
            return {}
        return self._read(path, order, received)

    def _read(self, path: Path | None, order: Order, received: Received) -> Tree:
        """What is in a memory's file, or what a site begins with where there is none."""
        if path is not None and path.exists():
            return nest(files.load(path, "memory")[1])
        if path is not None:
            logger.warning(
                "the memory of update %s is lost; the algorithm begins anew here", order.memory
            )
        return first_state(self._plan, received, self._blank(order.seed))

    def _blank(self, seed: int) -> Vectors:
        """What this site's private part of the model begins from."""
        if self._plan.split.trivial:
            return {}
        return self._plan.split.parts(self._plan.learner.init(Key(seed).fold("init")))[1]

    def _of(self, assignment: str) -> Path:
        return self._folder / f"{assignment}.safetensors"

    def _kept(self, assignment: str, exchange: int) -> Path:
        return self._questions / f"{assignment}-{exchange}.safetensors"
