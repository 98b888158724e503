"""The vault: bytes on their way between updates, sums and blobs, and what is kept of them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from atoll import wire
from atoll.aggregation.door import admit
from atoll.aggregation.stage import Accumulator
from atoll.errors import UpdateRefused
from atoll.rounds.cohort import discounted
from atoll.rounds.message import unpack
from atoll.rounds.plan import Plan
from atoll.rounds.schedules import Buffered
from atoll.rounds.server import Server
from atoll.service.blobs import Blobs
from atoll.service.store import Row, Store
from atoll.service.tables import assignments, uploads, versions
from atoll.vectors import Vectors


class Vault:
    """A federation's bytes: uploads in the making, accepted updates, model versions.

    Everything here blocks and may take long; the conductor calls it from its other thread.
    """

    def __init__(self, plan: Plan, store: Store, blobs: Blobs, scratch: Path) -> None:
        self.plan, self.store, self.blobs, self.scratch = plan, store, blobs, scratch

    def part(self, upload: str) -> Path:
        """The file that an upload grows in."""
        return self.scratch / f"{upload}.part"

    def fault(self, path: Path) -> str:
        """What is wrong with the update in a file, or nothing."""
        try:
            update = self.plan.stages.decode(unpack(_mapped(path)), self.plan.schema)
            admit(update, self.plan.schema)
        except UpdateRefused as refusal:
            return str(refusal)
        return ""

    def fold(self, row: Row, sums: Accumulator) -> None:
        """Take an accepted update into the sum."""
        path = self.blobs.local(row["digest"], self.scratch)
        update = self.plan.stages.decode(unpack(_mapped(path)), self.plan.schema)
        if isinstance(self.plan.schedule, Buffered):
            factor = self.plan.schedule.staleness.discount(row["staleness"])
            update = discounted(update, factor)
        sums.add(update)
        if path.parent == self.scratch:
            path.unlink()

    def keep(self, server: Server) -> dict[str, str]:
        """Put the server's vectors, what sites receive and the model into blobs."""
        return {
            "state": self.blobs.put(wire.encode(server.vectors()), self.scratch),
            "broadcast": self.blobs.put(wire.encode(server.broadcast()), self.scratch),
            "model": self.blobs.put(wire.encode(server.model()), self.scratch),
        }

    def vectors(self, digest: str) -> Vectors:
        """The arrays in a blob."""
        data = b"".join(self.blobs.read(digest))
        vectors, _ = wire.decode(data)
        return {name: np.array(vector) for name, vector in vectors.items()}

    def sweep(self, newest: int, at_work: Mapping[str, Row], kept: int) -> None:
        """Remove blobs and parts that nothing refers to."""
        waiting = self.store.rows(sa.select(assignments).where(assignments.c.counted > newest))
        needed = {row["version"] for row in (*at_work.values(), *waiting)}
        names = {row["digest"] for row in waiting}
        for row in self.store.rows(sa.select(versions)):
            if row["version"] > newest - kept or row["version"] in needed:
                names |= {row["state"], row["broadcast"], row["model"]}
        coming = self.store.rows(sa.select(uploads))
        names |= {row["digest"] for row in coming}
        for digest_ in self.blobs.all() - names:
            self.blobs.remove(digest_)
        parts = {f"{row['id']}.part" for row in coming}
        for path in self.scratch.glob("*.part"):
            if path.name not in parts:
                path.unlink(missing_ok=True)


def _mapped(path: Path) -> memoryview:
    """A file's bytes, read where they are needed; unmapped with the last view of them."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
