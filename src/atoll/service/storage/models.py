"""Models: bytes on their way between updates, sums and blobs, and what is kept of them."""

from __future__ import annotations

import json
import mmap
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from numpy.typing import NDArray

from atoll.aggregation.conversation import Ask
from atoll.aggregation.validate import validate
from atoll.core import room, safetensors
from atoll.core.files import file_digest
from atoll.core.updates import Sender, Update
from atoll.core.vectors import Tree, Vectors, flatten
from atoll.errors import CannotClose, UpdateRefused
from atoll.rounds.driver import Driver
from atoll.rounds.messages import unpack
from atoll.rounds.plan import Plan
from atoll.rounds.server import Server
from atoll.rounds.task import as_told, is_model
from atoll.service.storage.blobs import Blobs
from atoll.service.storage.database import Row, Store
from atoll.service.storage.tables import answers, assignments, uploads, versions

#: Files from here on are not left in memory; seconds between two times of letting go.
SMALL, PAUSE = 1 << 24, 0.002
#: What nobody speaks of is kept for so many seconds, if there is room for so many models.
LEFT_BEHIND, ROOM = 3600.0, 8
#: In a state's metadata: the blob in which some of its arrays lie, and under which names.
LINK = "elsewhere"


class ModelStore:
    """A federation's bytes: uploads in the making, accepted updates, model versions.

    Everything here blocks and may take long; the loop calls it from its other thread.
    """

    def __init__(self, plan: Plan, store: Store, blobs: Blobs, scratch: Path) -> None:
        self.plan, self.store, self.blobs, self.scratch = plan, store, blobs, scratch
        # Digests of what this process knows to be there.
        self._put: set[str] = set()
        self._sizes: dict[str, int] = {}
        #: Sizes of what came in whole, by digest, since this process has begun.
        self._taken: dict[str, int] = {}
        self._resting: list[room.Mapping] = []

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
        # What this process took in was hashed as it came; what lay on a disk since may be damaged.
        if self._taken.get(digest) != path.stat().st_size and file_digest(path) != digest:
            raise CannotClose(
                f"the answer of {sender[0]} was damaged where it was kept (blob {digest[:16]})"
            )
        with _passing(path) as data:
            update = self._read(data, driver.ask, told)
            try:
                driver.fold(update, sender, staleness)
            except (OSError, MemoryError):
                raise
            except Exception as error:
                # What a client sent must not be able to end a federation.
                name, text = type(error).__name__, str(error).partition("\n")[0][:100]
                raise CannotClose(
                    f"the answer of {sender[0]} could not be summed ({name}: {text})"
                ) from error
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
        with ExitStack() as stack:
            for mapped in self._resting:
                stack.enter_context(_letting_go(mapped))
            return work()

    def hand_out(self, tree: Tree) -> str:
        """Put what is told with a question into a blob; its digest."""
        digest = self.blobs.put(safetensors.encode(flatten(tree)), self.scratch)
        self._put.add(digest)
        return digest

    def keep(self, server: Server, version: int) -> dict[str, str]:
        """Put the server's vectors, what sites receive and the model into blobs."""
        model, told, state = server.model(), server.broadcast(version), server.vectors()
        made = {"model": self._keep(model)}
        if _large(model) and is_model(told, model):
            # One large file for sites, for people and for the state.
            made["broadcast"], sent = made["model"], model
        else:
            sent = flatten(told)
            made["broadcast"] = self._keep(sent)
        same = {
            name: other
            for name, vector in state.items()
            for other, lies in sent.items()
            if vector.nbytes >= room.LARGE and _same(vector, lies)
        }
        rest = {name: vector for name, vector in state.items() if name not in same}
        link = {LINK: json.dumps([made["broadcast"], same])} if same else {}
        made["state"] = self._keep(rest, link)
        self._put |= set(made.values())
        return made

    def _keep(self, vectors: Vectors, about: Mapping[str, str] | None = None) -> str:
        """Put arrays into a blob; what of them lies in mapped files leaves memory on the way."""
        return self.blobs.put(safetensors.passed(vectors, about or {}), self.scratch)

    def vectors(self, digest: str) -> Vectors:
        """The arrays in a blob, mapped: a model that is not looked at takes no memory."""
        own, vectors, about = self._mapped(digest)
        self._resting = [own]
        if LINK in about:
            blob, same = json.loads(about[LINK])
            other, sent, _ = self._mapped(blob)
            self._resting.append(other)
            vectors |= {name: sent[place] for name, place in same.items()}
        return vectors

    def read(self, digest: str) -> Tree:
        """What a blob of a broadcast says, mapped, beside the model at rest."""
        return as_told(self._mapped(digest)[1])

    def _mapped(self, digest: str) -> tuple[room.Mapping, Vectors, dict[str, str]]:
        """A blob with its arrays and metadata, mapped."""
        path = self.blobs.local(digest, self.scratch)
        mapped = room.opened(path)
        vectors, about = safetensors.decode(memoryview(mapped))
        if path.parent == self.scratch:
            path.unlink()
        return mapped, vectors, about

    def needed(
        self, newest: int, at_work: Mapping[str, Row], kept: int, best: int | None = None
    ) -> set[str]:
        """Digests that something may still refer to; of the `best` version, its model."""
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
        for row in self.store.rows(sa.select(versions).where(versions.c.version == best)):
            names.add(row["model"])
        return names | {row["digest"] for row in self.store.rows(sa.select(uploads))}

    def sweep(self, names: set[str]) -> None:
        """Remove what this process has put, but for these."""
        for digest in self._put - names:
            self.blobs.remove(digest)
            self._taken.pop(digest, None)
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
        size = path.stat().st_size
        self.blobs.take(path, digest)
        self._taken[digest] = size
        self._put.add(digest)

    def tidy(self, names: set[str]) -> None:
        """At the start: remove what earlier processes left behind, but for these.

        Sites may still ask for what is younger than an hour, unless there is no room for it.
        """
        before = time.time() - (LEFT_BEHIND if self.has_room() else 0.0)
        there = self.blobs.all()
        self._put |= set(there) & names
        for digest, since in there.items():
            if digest not in names and since <= before:
                self.blobs.remove(digest)
        coming = self.store.rows(sa.select(uploads))
        parts = {f"{row['id']}.part" for row in coming}
        for path in self.scratch.iterdir():
            if path.name not in parts and path.stat().st_mtime <= before:
                path.unlink(missing_ok=True)

    def has_room(self) -> bool:
        """Whether the disk holds several models more."""
        return shutil.disk_usage(self.scratch).free > ROOM * 4 * self.plan.learner.layout.size

    def named(self) -> set[str]:
        """Every digest that the database names, whether it is still needed or not."""
        found: set[str] = set()
        for table, columns in (
            (versions, ("state", "broadcast", "model")), (assignments, ("digest",)),
            (answers, ("digest",)), (uploads, ("digest",)),
        ):  # fmt: skip
            for row in self.store.rows(sa.select(*(table.c[name] for name in columns))):
                found |= {digest for digest in row.values() if digest}
        return found


def _large(vectors: Vectors) -> bool:
    return any(vector.nbytes >= room.LARGE for vector in vectors.values())


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are the same memory."""
    return one.__array_interface__ == other.__array_interface__


@contextmanager
def _passing(path: Path) -> Iterator[memoryview]:
    """A file's bytes to be gone through once."""
    mapped = room.opened(path)
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
        mapped.madvise(mmap.MADV_DONTNEED)
