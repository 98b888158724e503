"""Processes of a federation within one: a server's loop and agents, killed at chosen instants."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import sqlalchemy as sa
from masks import Masked

from atoll import Federation, algorithms, data, schedules
from atoll.core import files
from atoll.learners import NumpyLearner
from atoll.protocol import messages
from atoll.rounds.coordinator import Answer
from atoll.service.http.app import App
from atoll.service.http.site_api import STATUS, SiteApi
from atoll.service.loop import FederationLoop
from atoll.service.settings import Service
from atoll.service.storage.blobs import Folder
from atoll.service.storage.database import Store
from atoll.service.storage.tables import answers, sites
from atoll.site import agent
from atoll.site.agent import Site
from atoll.site.connection import Refusal


class Killed(BaseException):
    """As SIGKILL: nothing that comes after is done."""


class Instants:
    """What a process does that lasts, counted; at the chosen place it is killed."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.dead = at, 0, False

    def pass_by(self) -> None:
        if self.dead or self.count == self.at:
            self.dead = True
            raise Killed
        self.count += 1


def population(clients: int = 3):
    return data.load("digits").dirichlet(clients=clients, alpha=0.5, seed=0)


def plan_of(pipeline: Any = None, algorithm: Any = None, **schedule: Any) -> Federation:
    return Federation(
        learner=NumpyLearner(layers=(64, 10), lr=0.1, batch_size=32),
        algorithm=algorithm or algorithms.FedAvg(weighting="uniform"),
        schedule=schedules.Synchronous(**{"rounds": 1, "pause": 0.0, **schedule}),
        pipeline=pipeline or Masked(),
    )


class World:
    """A store, blobs, a clock, and agents by name; each may be killed and started again."""

    made: ClassVar[list[World]] = []

    def __init__(self, root: Path, plan: Federation | None = None, names: str = "012") -> None:
        World.made.append(self)
        self.root, self.now, self.plan = root, 1000.0, plan or plan_of()
        root.mkdir(exist_ok=True)
        (root / "incoming").mkdir()
        self.data = population()
        self.server, self.client = Instants(), Instants()
        #: What was asked: by round, attempt and question, the blobs that were told.
        self.asked: dict[tuple[int, int, int], Any] = {}
        #: What agents sent: by name, the assignment, the question and the bytes' digest.
        self.sent: dict[str, list[tuple[str, int, str]]] = {}
        self.bytes: dict[tuple[str, int], bytes] = {}
        self.sites: dict[str, Site] = {}
        for name in names:
            self.join(name)

    def store(self) -> Store:
        return Store(f"sqlite:///{self.root / 'x.db'}")

    def join(self, name: str) -> None:
        store = self.store()
        with store.change(leading=False) as change:
            change.run(
                sites.insert().values(
                    name=name, key=name, role="site", status="active", joined=self.now, seen=0,
                    examples=1, about="{}",
                )
            )  # fmt: skip
        store.close()
        self.start_site(name)

    def start_site(self, name: str) -> None:
        """Start an agent, anew if it was there; what it knows is in its folder."""
        if name in self.sites:
            self.sites[name]._held.close()
        place = self.data.names.index(name)
        folder = self.root / f"site-{name}"
        folder.mkdir(exist_ok=True)
        site = Site(folder, self.plan, self.data.subset([place]), report=lambda text: None)
        site.link = Wire(self, name)  # type: ignore[assignment]
        self.sites[name] = site

    @asynccontextmanager
    async def process(self, instants: Instants | None = None, **service: Any):
        """A server's process, from its start until it leaves, or is killed."""
        self.server = instants or Instants()
        store = self.store()
        assert store.lead()
        made = FederationLoop(
            self.plan, Service(**service), store, Folder(self.root / "blobs"),
            self.root / "incoming", clock=lambda: self.now, history=self.root / "run",
        )  # fmt: skip
        put = made._put

        def noted(question: Any) -> None:
            now = made.coordinator.round, made.coordinator.attempt, question.step
            told = question.name, question.told, dict(question.mail)
            assert self.asked.setdefault(now, told) == told, "another question than before"
            put(question)

        made._put = noted  # type: ignore[method-assign]
        made.home = asyncio.get_running_loop()  # type: ignore[attr-defined]
        try:
            await made.start()
            self.loop = made
            yield made
            await made.close()
        finally:
            if made._worker is not None:
                made._worker.cancel()
                with suppress(BaseException):
                    await made._worker
            made._thread.shutdown()
            if (held := getattr(made.history, "_held", None)) is not None:
                held.close()
            store.resign()
            store.close()

    async def order(self, loop: FederationLoop, name: str) -> messages.Order:
        loop.members.saw(name)
        return await SiteApi(App(b"", "p", "t"))._order(loop, name, 0.0, False)

    async def go_on(self, loop: FederationLoop, silent=lambda name, order: False) -> None:
        """Agents ask and answer, one after the other, until there is nothing more to do."""
        while True:
            loop.tick()
            await settled(loop)
            idle = True
            for name in list(self.sites):
                await self.does(loop, name, self.sites[name]._send_outbox)
                order = await self.order(loop, name)
                if order.kind == "train" and not silent(name, order):
                    idle = False
                    await self.does(loop, name, self.sites[name]._train, order)
            if idle:
                return

    async def does(self, loop: FederationLoop, name: str, work: Any, *given: Any) -> None:
        """An agent does something; killed, it is started again."""
        try:
            await asyncio.to_thread(work, *given)
        except Killed:
            if self.server.dead:
                raise
            self.client = Instants()
            self.start_site(name)
        await settled(loop)

    @classmethod
    def close_all(cls) -> None:
        """Let go of the folders of all agents."""
        while cls.made:
            for site in cls.made.pop().sites.values():
                site._held.close()

    def answers(self) -> dict[tuple[str, int], str]:
        store = self.store()
        rows = store.rows(sa.select(answers))
        store.close()
        return {(row["assignment"], row["step"]): row["digest"] for row in rows}

    def version(self) -> Any:
        store = self.store()
        row = store.version()
        store.close()
        return row


class Wire:
    """What an agent's connection would do, without a network."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.site = world, name
        self.sent = world.sent.setdefault(name, [])

    def _do(self, coroutine: Any) -> Any:
        home = self.world.loop.home  # type: ignore[attr-defined]
        return asyncio.run_coroutine_threadsafe(coroutine, home).result(60)

    def fetch(self, digest: str, size: int, path: Path) -> None:
        data = b"".join(self.world.loop.models.blobs.read(digest))
        assert len(data) == size
        path.write_bytes(data)

    def upload(
        self, path: Path, assignment: str, exchange: int = 0, model: str | None = None
    ) -> messages.Verdict:
        data = path.read_bytes()
        self.world.bytes[assignment, exchange] = data
        self.sent.append((assignment, exchange, sha256(data).hexdigest()))
        self.world.client.pass_by()
        answer = self._do(offer(self.world.loop, self.site, assignment, exchange, data, model))
        self.world.client.pass_by()
        if STATUS[answer.verdict] != 200:
            raise Refusal(STATUS[answer.verdict], answer.reason)
        return messages.Verdict(str(answer.verdict), answer.reason)

    def close(self) -> None:
        pass


async def offer(
    loop: FederationLoop,
    site: str,
    assignment: str,
    step: int,
    data: bytes,
    model: str | None = None,
) -> Answer:
    """An answer is offered and delivered."""
    assert len(data) <= loop.largest
    upload = loop.offer(site, assignment, len(data), sha256(data).hexdigest(), step, model)
    if isinstance(upload, Answer):
        return upload
    loop.models.part(upload["id"]).write_bytes(data)
    return await loop.deliver(upload)


async def settled(loop: FederationLoop) -> None:
    """Wait until all that is due is done, or the process has died of it."""
    joined = asyncio.ensure_future(loop._work.join())
    try:
        await asyncio.wait({joined, loop._worker}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        if loop._worker.done():
            raise loop._worker.exception() or Killed
        assert joined.done(), "the server hangs"
    finally:
        joined.cancel()
    if loop.failed is not None:
        raise loop.failed


@contextmanager
def killing(monkeypatch, world):
    """Have every process of a world pass by its instants wherever it does what lasts."""
    change, take = Store.change, Folder.take

    @contextmanager
    def changed(store, *, leading=True):
        with change(store, leading=leading) as made:
            yield made
            if leading:
                world.server.pass_by()
        if leading:
            world.server.pass_by()

    def taken(blobs, path, digest):
        world.server.pass_by()
        take(blobs, path, digest)
        world.server.pass_by()

    def client(function):
        def done(*given, **more):
            world.client.pass_by()
            function(*given, **more)
            world.client.pass_by()

        return done

    own = {name: getattr(files, name) for name in ("load", "file_digest")}
    own |= {name: client(getattr(files, name)) for name in ("save", "write_atomically")}
    with monkeypatch.context() as patch:
        patch.setattr(Store, "change", changed)
        patch.setattr(Folder, "take", taken)
        patch.setattr(agent, "files", SimpleNamespace(**own))
        yield
