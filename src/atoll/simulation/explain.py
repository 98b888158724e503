"""The explanation of how a federation would be run: engine, reasons, layers, memory."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.backends.backend import Arrangement, Engine, cores
from atoll.core.random import Key
from atoll.data.federated import FederatedData
from atoll.learners.base import stacking
from atoll.rounds.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """What `Federation.explain` found; its text is for people.

    `rows` are (layer, kind, how it is run); `memory` is an estimate in bytes of what the workers
    hold in a round, beyond the data.
    """

    engine: str
    notes: tuple[str, ...]
    rows: tuple[tuple[str, str, str], ...]
    workers: int
    threads: int
    memory: int

    def __str__(self) -> str:
        lines = [f"engine   {self.engine}"]
        lines += [f"         {note}" for note in self.notes]
        lines.append(
            f"workers  {self.workers}, each with {self.threads} of {cores()} cores for an operation"
        )
        lines.append(f"memory   about {self.memory / 2**20:.0f} MiB for parameters in a round")
        width = max([5, *(len(layer) for layer, _, _ in self.rows)])
        kinds = max([4, *(len(kind) for _, kind, _ in self.rows)])
        lines.append("")
        lines.append(f"{'layer':<{width}}  {'kind':<{kinds}}  how it is run")
        lines += [
            f"{layer or '(all)':<{width}}  {kind:<{kinds}}  {how}" for layer, kind, how in self.rows
        ]
        return "\n".join(lines)


def explain(plan: Plan, data: FederatedData, engine: Engine, seed: int) -> Explanation:
    """How this engine would run this plan over these data."""
    plan.check_data(data)
    with engine.open(plan, data, Key(seed)) as backend:
        found, notes = backend.engine, tuple(backend.notes)
    rows = stacking(plan.learner).explain(data.train(0))
    if not isinstance(found, Arrangement):
        notes = (*notes, "chosen by measuring, when the first clients are at work")
        return Explanation(str(found), notes, rows, 0, 0, 0)
    size = 4 * plan.learner.layout.size
    # Parameters, results and updates of a block for each worker; the exact sum, two words wide.
    reports = len(plan.schema.vectors)
    memory = found.workers * found.block * size * (2 + reports) + 4 * size * reports
    return Explanation(str(found), notes, rows, found.workers, found.threads, memory)
