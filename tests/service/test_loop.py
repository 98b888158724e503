"""The federation loop on our clock: crashes, failures and latecomers at chosen instants."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from atoll import Federation, algorithms, data, schedules, stopping
from atoll.core.updates import Update
from atoll.errors import CheckpointError, RunError
from atoll.learners import NumpyLearner
from atoll.rounds.messages import pack
from atoll.service.loop import FederationLoop
from atoll.service.settings import Service
from atoll.service.storage import rounds as ledger
from atoll.service.storage.blobs import Folder
from atoll.service.storage.database import NotLeading, Store
from atoll.service.storage.tables import rounds, sites


class World:
    """A store, blobs, a clock, and sites by name."""

    def __init__(self, root: Path, names: str = "abc", **schedule):
        self.root, self.names, self.now = root, names, 1000.0
        (root / "incoming").mkdir()
        self.plan = Federation(
            learner=NumpyLearner(layers=(2, 2), lr=0.1, batch_size=4),
            algorithm=algorithms.FedAvg(),
            schedule=schedules.Synchronous(**{"rounds": 3, **schedule}),
        )
        with self.store() as store, store.change(leading=False) as change:
            for name in names:
                change.run(
                    sites.insert().values(
                        name=name, key=name, role="site", status="active", joined=1, seen=0,
                        examples=1, about="{}",
                    )
                )  # fmt: skip

    def store(self):
        from contextlib import closing

        return closing(Store(f"sqlite:///{self.root / 'x.db'}"))

    @asynccontextmanager
    async def loop(self, **service):
        with self.store() as store:
            assert store.lead()
            made = FederationLoop(
                self.plan, Service(**service), store, Folder(self.root / "blobs"),
                self.root / "incoming", clock=lambda: self.now,
            )  # fmt: skip
            await made.start()
            try:
                yield made
            finally:
                await made.close()
                store.resign()

    def offer(self, loop, site, value, id=None, step=0):
        """A site's update, all of it on disk, not yet decided upon."""
        row = loop.open[site] if id is None else {"id": id}
        delta = np.full(self.plan.learner.layout.size, value, np.float32)
        data = b"".join(bytes(piece) for piece in pack(Update({"delta": delta}, 1.0)))
        upload = loop.offer(site, row["id"], len(data), sha256(data).hexdigest(), step)
        loop.models.part(upload["id"]).write_bytes(data)
        return upload

    def moved(self, loop):
        """How far the model is from its beginning."""
        from atoll.core.random import Key

        first = self.plan.learner.init(Key(0).fold("init"))["params"]
        return float(np.mean(loop.server.model()["params"] - first))


async def settled(loop):
    await asyncio.wait_for(loop._work.join(), 20)


def test_a_step_never_follows_a_missed_fold(tmp_path, monkeypatch):
    world = World(tmp_path)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            fold, calls = loop.models.fold, []

            def failing(*given):
                calls.append(given)
                if len(calls) == 2:
                    raise OSError("no space left")
                fold(*given)

            monkeypatch.setattr(loop.models, "fold", failing)
            for site, value in zip("abc", (1, 2, 6), strict=True):
                answer = await loop.deliver(world.offer(loop, site, value))
                assert answer.accepted
                if site == "b":
                    break
            await settled(loop)
            assert isinstance(loop.failed, OSError)
            with pytest.raises(RunError, match="this process is ending"):
                await loop.deliver(world.offer(loop, "c", 6))
            assert loop.store.version()["version"] == 0
        # A new process sums what was accepted, and goes on.
        async with world.loop() as loop:
            loop.tick()
            assert set(loop.open) == {"c"}
            assert (await loop.deliver(world.offer(loop, "c", 6))).accepted
            await settled(loop)
            assert loop.version["version"] == 1
            assert world.moved(loop) == pytest.approx(3, abs=1e-5)

    asyncio.run(story())


def test_a_decision_that_was_not_kept_is_not_kept_later_either(tmp_path, monkeypatch):
    world = World(tmp_path)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            upload = world.offer(loop, "a", 1)
            with monkeypatch.context() as patch:

                def broken(*rest, **more):
                    raise ConnectionError("the database went away")

                patch.setattr(ledger, "delivered", broken)
                with pytest.raises(ConnectionError):
                    await loop.deliver(upload)
            with pytest.raises(RunError):
                loop.give_up("b", loop.open["b"]["id"], "gone")
        async with world.loop() as loop:
            assert set(loop.open) == {"a", "b", "c"}
            for site, value in zip("abc", (1, 2, 6), strict=True):
                assert (await loop.deliver(world.offer(loop, site, value))).accepted
            await settled(loop)
            assert world.moved(loop) == pytest.approx(3, abs=1e-5)

    asyncio.run(story())


@pytest.mark.parametrize("instant", ["before the fold", "before the step", "before it is known"])
def test_killed_between_any_two_steps_it_is_the_same_model(tmp_path, monkeypatch, instant):
    world = World(tmp_path)

    class Killed(BaseException):
        pass

    async def story():
        async def begin():
            async with world.loop() as loop:
                loop.tick()
                if instant == "before it is known":

                    def killed(*rest):
                        raise Killed

                    monkeypatch.setattr(ledger, "stepped", killed)
                else:
                    loop._worker.cancel()
                    if instant == "before the step":
                        loop._work = asyncio.Queue()
                for site, value in zip("abc", (1, 2, 6), strict=True):
                    await loop.deliver(world.offer(loop, site, value))
                if instant == "before it is known":
                    for _ in range(200):
                        if loop._worker.done():
                            break
                        await asyncio.sleep(0.01)
                # As SIGKILL would leave it: nothing is finished.
                loop._worker = None
                raise Killed

        with pytest.raises(BaseException):  # noqa: B017, PT011
            await begin()
        monkeypatch.undo()
        async with world.loop() as loop:
            assert loop.version["version"] == 1
            assert world.moved(loop) == pytest.approx(3, abs=1e-5)
            loop.tick()
            assert {row["round"] for row in loop.open.values()} == {2}

    asyncio.run(story())


def test_a_late_upload_leaves_the_new_assignment_alone(tmp_path):
    world = World(tmp_path, "ab", cohort=1, invite=2)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            slow = world.offer(loop, "b", 5)
            assert (await loop.deliver(world.offer(loop, "a", 1))).accepted
            await settled(loop)
            loop.tick()
            assert loop.open["b"]["round"] == 2
            assert not (await loop.deliver(slow)).accepted
            assert loop.open["b"]["round"] == 2
            assert (await loop.deliver(world.offer(loop, "b", 3))).accepted
            await settled(loop)
            assert world.moved(loop) == pytest.approx(4, abs=1e-5)
            assert not list((tmp_path / "incoming").glob("*.part"))

    asyncio.run(story())


def test_an_update_that_ends_while_the_server_leaves_is_to_come_again(tmp_path):
    world = World(tmp_path, "ab", cohort=2)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            last = world.offer(loop, "a", 5)
        with pytest.raises(NotLeading, match="leaving"):
            await loop.deliver(last)
        async with world.loop() as loop:
            again = world.offer(loop, "a", 5)
            assert (await loop.deliver(again)).accepted

    asyncio.run(story())


def test_too_few_sites_are_waited_for(tmp_path):
    world = World(tmp_path, "ab", cohort=3)

    async def story():
        async with world.loop(sites=1) as loop:
            loop.tick()
            assert "needs 3, and 2 are part" in loop.waiting
            assert not loop.open
            with loop.store.change() as change:
                change.run(
                    sites.insert().values(
                        name="c", key="c", role="site", status="active", joined=2, seen=0,
                        examples=1, about="{}",
                    )
                )  # fmt: skip
            loop.members.saw("c")
            loop.tick()
            assert set(loop.open) == {"a", "b", "c"}

    asyncio.run(story())


def test_a_machine_that_slept_holds_it_against_nobody(tmp_path):
    world = World(tmp_path, deadline=60.0)

    async def story():
        async with world.loop(lease=100.0) as loop:
            loop.tick()
            world.now += 3600
            loop.tick()
            assert set(loop.open) == {"a", "b", "c"}
            for _ in range(8):
                world.now += 20
                loop.tick()
            # But in time that passes under its eyes the deadline and leases hold.
            assert loop.coordinator.attempt >= 1

    asyncio.run(story())


def test_a_clock_that_is_set_back_keeps_no_dead_sites_round_open(tmp_path):
    world = World(tmp_path)

    async def story():
        async with world.loop(lease=100.0) as loop:
            loop.tick()
            assert set(loop.open) == {"a", "b", "c"}
            world.now -= 86400
            loop.tick()
            assert set(loop.open) == {"a", "b", "c"}
            for _ in range(6):  # 120 seconds by any clock
                world.now += 20
                loop.tick()
            assert not loop.open or loop.coordinator.attempt >= 1

    asyncio.run(story())


def test_an_asynchronous_run_of_refused_updates_ends(tmp_path):
    world = World(tmp_path, "ab")
    world.plan = replace(world.plan, schedule=schedules.Buffered(rounds=5, concurrency=2, buffer=1))

    async def story():
        async with world.loop() as loop:
            loop.tick()
            for n in range(200):
                if loop.done:
                    break
                site = "ab"[n % 2]
                answer = await loop.deliver(world.offer(loop, site, np.nan))
                assert "NaN" in answer.reason
                loop.tick()
            assert n == 111
            assert loop.version["version"] == 0

    asyncio.run(story())


def test_a_place_of_blobs_has_one_owner(tmp_path):
    world = World(tmp_path)

    async def story():
        async with world.loop():
            pass
        with pytest.raises(CheckpointError, match="another federation's"):
            Folder(tmp_path / "blobs").claim("someone else")

    asyncio.run(story())


def test_a_given_up_federation_may_be_given_more_tries(tmp_path):
    from atoll.core.random import Key
    from atoll.rounds import Coordinator, Phase, Roster

    roster = Roster(["a"], np.ones(1, np.int64))
    machine = Coordinator(schedules.Synchronous(rounds=1, attempts=1), Key(0))
    (invitation,) = machine.open(roster, 0.0)
    machine.lost(invitation.id, 1.0)
    assert machine.phase is Phase.FAILED
    again = Coordinator(schedules.Synchronous(rounds=1, attempts=2), Key(0))
    again.restore(machine.state())
    assert again.phase is Phase.IDLE
    assert len(again.open(roster, 2.0)) == 1


def test_a_stop_rule_that_held_when_the_server_died_holds_when_it_is_back(tmp_path):
    world = World(tmp_path, rounds=5, minimum=3)
    rule = stopping.Target("float_fallback", 0.0, higher=False)
    world.plan = replace(world.plan, stop=rule)

    async def play(loop):
        loop.tick()
        for site in list(loop.open):
            await loop.deliver(world.offer(loop, site, 1))
        await settled(loop)

    def killed(names):
        raise OSError("killed here")

    async def story():
        async with world.loop() as loop:
            loop.models.sweep = killed
            await play(loop)
            assert loop.version["version"] == 1 and not loop.stopping
        async with world.loop() as loop:
            assert loop.stopping and loop.done
            await play(loop)
            assert loop.version["version"] == 1

    asyncio.run(story())


@dataclass(frozen=True)
class Counting(algorithms.LocalRule):
    """Remembers how often its work has counted."""

    def remember(self, got, shared):
        return {"times": np.zeros(1, np.float32)}

    def finish(self, client, local, got, mine):
        return {}, {"times": mine["times"] + 1}


@dataclass(frozen=True, kw_only=True)
class Twice(algorithms.FedAvg):
    """Everyone works, and then the first two once more; the second aggregate counts."""

    def talk(self, state, talk):
        yield algorithms.Gather({})
        return (yield algorithms.Gather({}, talk.members[:2]))


def test_only_who_worked_for_the_aggregate_counts_and_keeps_what_it_learned(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    pieces = zip("abc", np.split(x, 3), strict=True)
    parts = {name: (own, (own[:, 0] > 0) * 1) for name, own in pieces}
    world = World(tmp_path)
    world.plan = replace(world.plan, algorithm=Twice(local=Counting()))
    simulated = world.plan.rounds(data.from_clients(parts, test=0.2))
    record = next(iter(simulated))
    assert sorted(simulated._simulator.states) == [0, 1] and record.accepted == 2

    async def story():
        async with world.loop() as loop:
            loop.tick()
            await settled(loop)
            for step in (0, 1):
                for site in sorted(loop.open):
                    await loop.deliver(world.offer(loop, site, 1 + step, step=step))
                await settled(loop)
            assert loop.history.records[-1].accepted == 2
            kept = {site: loop.memory_of(site) for site in "abc"}
            assert kept["a"] and kept["b"] and not kept["c"]
            assert world.moved(loop) == pytest.approx(2)

    asyncio.run(story())


@pytest.mark.parametrize("damage", ["a few bytes", "its end"])
def test_an_update_that_was_damaged_on_the_disk_is_in_no_sum(tmp_path, damage):
    world = World(tmp_path, pause=0.0)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            for site, value in (("a", 1), ("b", 2)):
                upload = world.offer(loop, site, value)
                assert (await loop.deliver(upload)).accepted
            await settled(loop)
            path = loop.models.blobs.local(upload["digest"], loop.models.scratch)
        data = bytearray(path.read_bytes())
        path.chmod(0o600)
        if damage == "a few bytes":
            data[-5] ^= 64
        path.write_bytes(data if damage == "a few bytes" else data[: len(data) // 2])
        async with world.loop() as loop:
            reasons = [row["reason"] for row in loop.store.rows(sa.select(rounds))]
            assert any("the answer of b was damaged where it was kept" in each for each in reasons)
            world.now += 1
            loop.tick()
            await settled(loop)
            for site, value in (("a", 1), ("b", 2), ("c", 6)):
                assert (await loop.deliver(world.offer(loop, site, value))).accepted
            await settled(loop)
            assert world.moved(loop) == pytest.approx(3, abs=1e-5)

    asyncio.run(story())
