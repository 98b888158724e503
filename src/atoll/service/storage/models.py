"""Models: bytes on their way between updates, sums and blobs, and what is kept of them."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from atoll.aggregation.conversation import Ask
from atoll.aggregation.validate import validate
from atoll.core import safetensors
from atoll.core.updates import Sender, Update
from atoll.core.vectors import Tree, Vectors, flatten
from atoll.errors import UpdateRefused
from atoll.rounds.driver import Driver
from atoll.rounds.messages import unpack
from atoll.rounds.plan import Plan
from atoll.rounds.server import Server
from atoll.service.storage.blobs import Blobs
from atoll.service.storage.database import Row, Store
from atoll.service.storage.tables import answers, assignments, uploads, versions

#: Files from here on are not left in memory; seconds between two times of letting go.
SMALL, PAUSE = 1 << 24, 0.002
#: Seconds after which something that nobody names was left behind.
LEFT_BEHIND = 3600.0


class ModelStore:
    """A federation's bytes: uploads in the making, accepted updates, model versions.

    Everything here blocks and may take long; the loop calls it from its other thread.
    """

    def __init__(self, plan: Plan, store: Store, blobs: Blobs, scratch: Path) -> None:
        self.plan, self.store, self.blobs, self.scratch = plan, store, blobs, scratch
        # Digests of what this process knows to be there.
        self._put: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._resting: mmap.mmap | None = None

    def part(self, upload: str) -> Path:
        """The file that an upload grows in."""
        return self.scratch / f"{upload}.part"

    def fault(self, path: Path, ask: Ask, told: Tree) -> str:
        """What is wrong with the answer to a question in a file, or nothing."""
        try:
            with _passing(path) as data:
                self._read(data, ask, told)
        except UpdateRefused as refusal:
            return str(refusal)
        return ""

    def fold(self, driver: Driver, digest: str, sender: Sender, told: Tree, staleness: int) -> None:
        """Take an accepted answer into what the open question gathers."""
        path = self.blobs.local(digest, self.scratch)
        with _passing(path) as data:
            driver.fold(self._read(data, driver.ask, told), sender, staleness)
        if path.parent == self.scratch:
            path.unlink()

    def _read(self, data: memoryview, ask: Ask, told: Tree) -> Update:
        """A checked answer; an update is decoded, with what its client was told of the stages."""
        message = unpack(data)
        if ask.works:
            return self.plan.stages.decode(message, told)
        validate(message, ask.schema)
        return message

    def step(self, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Take a step at the server; the old model goes through memory, and does not stay."""
        assert self._resting is not None
        with _letting_go(self._resting):
            return work()

    def hand_out(self, tree: Tree) -> str:
        """Put what is told with a question into a blob; its digest."""
        digest = self.blobs.put(safetensors.encode(flatten(tree)), self.scratch)
        self._put.add(digest)
        return digest

    def keep(self, server: Server, version: int) -> dict[str, str]:
        """Put the server's vectors, what sites receive and the model into blobs."""
        told = flatten(server.broadcast(version))
        made = {
            "state": self.blobs.put(safetensors.encode(server.vectors()), self.scratch),
            "broadcast": self.blobs.put(safetensors.encode(told), self.scratch),
            "model": self.blobs.put(safetensors.encode(server.model()), self.scratch),
        }
        self._put |= set(made.values())
        return made

    def vectors(self, digest: str) -> Vectors:
        """The arrays in a blob, mapped: a model that is not looked at takes no memory."""
        path = self.blobs.local(digest, self.scratch)
        self._resting = _mapped(path)
        vectors, _ = safetensors.decode(memoryview(self._resting))
        if path.parent == self.scratch:
            path.unlink()
        return vectors

    def read(self, digest: str) -> Vectors:
        """The arrays in a blob, mapped, beside the model at rest."""
        path = self.blobs.local(digest, self.scratch)
        vectors, _ = safetensors.decode(memoryview(_mapped(path)))
        if path.parent == self.scratch:
            path.unlink()
        return vectors

    def needed(self, newest: int, at_work: Mapping[str, Row], kept: int) -> set[str]:
        """Digests that something may still refer to."""
        waiting = self.store.rows(sa.select(assignments).where(assignments.c.counted > newest))
        needed = {row["version"] for row in (*at_work.values(), *waiting)}
        names = {row["digest"] for row in waiting}
        ours = sa.select(assignments.c.id).where(
            (assignments.c.counted > newest) | (assignments.c.round > newest)
        )
        kept_answers = sa.select(answers.c.digest).where(answers.c.assignment.in_(ours))
        names |= {row["digest"] for row in self.store.rows(kept_answers)}
        recent = versions.c.version > newest - kept
        query = sa.select(versions).where(recent | versions.c.version.in_(needed))
        for row in self.store.rows(query):
            names |= {row["state"], row["broadcast"], row["model"]}
        return names | {row["digest"] for row in self.store.rows(sa.select(uploads))}

    def sweep(self, names: set[str]) -> None:
        """Remove what this process has put, but for these."""
        for digest in self._put - names:
            self.blobs.remove(digest)
        self._put &= names

    def size(self, digest: str) -> int:
        """Bytes of a blob, asked once."""
        if digest not in self._sizes:
            if len(self._sizes) > 64:
                self._sizes.clear()
            self._sizes[digest] = self.blobs.size(digest)
        return self._sizes[digest]

    def take(self, path: Path, digest: str) -> None:
        """Keep an upload's bytes."""
        self.blobs.take(path, digest)
        self._put.add(digest)

    def tidy(self, newest: int, at_work: Mapping[str, Row], kept: int) -> None:
        """At the start: remove what earlier processes left behind.

        What is younger than an hour may be another process's, about to be spoken of.
        """
        there = self.blobs.all()
        names = self.needed(newest, at_work, kept)
        self._put |= set(there) & names
        for digest, since in there.items():
            if digest not in names and time.time() - since > LEFT_BEHIND:
                self.blobs.remove(digest)
        coming = self.store.rows(sa.select(uploads))
        parts = {f"{row['id']}.part" for row in coming}
        for path in self.scratch.iterdir():
            if path.name not in parts and time.time() - path.stat().st_mtime > LEFT_BEHIND:
                path.unlink(missing_ok=True)


def _mapped(path: Path) -> mmap.mmap:
    """A file's bytes, read where they are needed; unmapped with the last view of them."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def _passing(path: Path) -> Iterator[memoryview]:
    """A file's bytes to be gone through once."""
    mapped = _mapped(path)
    with _letting_go(mapped):
        yield memoryview(mapped)


@contextmanager
def _letting_go(mapped: mmap.mmap) -> Iterator[None]:
    """While this lasts, what was read of a large file leaves this process's memory again."""
    if len(mapped) < SMALL or not hasattr(mmap.mmap, "madvise"):
        yield
        return
    done = threading.Event()

    def let_go() -> None:
        while not done.wait(PAUSE):
            mapped.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=let_go, name="atoll-pages")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
