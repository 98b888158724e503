"""Rounds of several questions: whoever falls silent or dies, sums are exact or there are none."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import threading
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from masks import UNIT, Asking, Early, Fragile, Masked, whole_numbers
from processes import Instants, Killed, World, killing, offer, plan_of, population, settled

from atoll.aggregation import Mean
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.errors import CannotClose
from atoll.rounds import Phase, Roster
from atoll.rounds.driver import Driver, whom_of
from atoll.rounds.messages import pack
from atoll.rounds.task import (
    ClientTask,
    Received,
    answer_question,
    first_state,
    run_task,
    with_question,
)
from atoll.service import operations
from atoll.service.http.app import App
from atoll.service.http.watching import ServedSource
from atoll.service.storage import rounds as ledger
from atoll.service.storage.audit import lines

pytest.importorskip("sklearn")


@pytest.fixture
def room(tmp_path):
    """A folder for many worlds: in memory, if that can be, where to sync costs nothing."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=memory, prefix="atoll-") as folder:
            yield Path(folder)
    World.close_all()


EXCHANGES = ("keys", "shares", "update", "unmask")


def updates_of(plan, data, key, step):
    """What every client would report in the first round to a question, unmasked."""
    driver = Driver(plan, key)
    received = Received.of(plan, driver.server.broadcast(0))
    found = []
    for member, name in enumerate(data.names):
        task = ClientTask.read([member, name, 1, 1, 1.0, 1.0, step], key, {})
        found.append(run_task(plan, received, task, data.train(member))[0].vectors["delta"])
    return found


def attempt(plan, data, key, silent, order):
    """One attempt in which each client falls silent at a question; driver and coordinator."""
    driver = Driver(plan, key)
    coordinator, received = driver.coordinator, driver.server.broadcast(0)
    invitations = coordinator.open(Roster(data.names, data.sizes()), 0.0)
    senders = {each.id: (each.client, each.turn) for each in invitations}
    ask = driver.begin(1, [*senders.values()], len(data))
    asked, kept = whom_of(ask, invitations), {}
    coordinator.need(ask.fewest, [each.id for each in asked])
    while coordinator.phase in (Phase.OPEN, Phase.HEARD):
        step = coordinator.step
        assert ask.name == EXCHANGES[step]
        opened = Received.of(plan, with_question(received, ask))
        for each in order(asked):
            if silent[each.member] <= step:
                coordinator.lost(each.id, 0.0)
                continue
            state = first_state(plan, opened, {}) | {"kept": kept.get(each.id, {})}
            mail = ask.mail.get(senders[each.id], {})
            row = [each.member, each.client, 1, each.turn, 1.0, 1.0, step]
            task = ClientTask.read(row, key, state, mail)
            examples = data.train(each.member)
            if ask.works:
                message, after = run_task(plan, opened, task, examples)
                kept[each.id] = after.get("kept", {})
                message = plan.stages.decode(message, {})
            else:
                message, kept[each.id] = answer_question(
                    plan, opened, ask.name, ask.owner, task, examples
                )
            if coordinator.deliver(each.id, each.client, 0.0, "", step).accepted:
                driver.fold(message, senders[each.id])
        if coordinator.phase is not Phase.HEARD:
            break
        if ask.works:
            coordinator.worked()
        try:
            ask = driver.hear([senders[id] for id in coordinator.heard])
        except CannotClose as error:
            coordinator.abandon(str(error))
            break
        if ask is None:
            coordinator.finish()
            break
        answered = [each for each in invitations if each.id in coordinator.heard]
        asked = whom_of(ask, answered)
        coordinator.ask(ask.fewest, [each.id for each in asked], 0.0)
    return driver, coordinator


@pytest.mark.parametrize("order", [list, lambda asked: [*reversed(asked)]], ids=["", "reversed"])
def test_whoever_falls_silent_sums_are_exact_or_there_are_none(order):
    """All 125 ways in which three clients fall silent at four questions, or never (4)."""
    data, key = population(), Key(3)
    plan = plan_of(minimum=1)
    own = [whole_numbers(delta) for delta in updates_of(plan_of(Mean()), data, key, 2)]
    before = Driver(plan, key).server.state["params"]
    closed = 0
    for silent in product(range(5), repeat=3):
        there = [{n for n in range(3) if silent[n] > step} for step in range(4)]
        enough = all(len(names) >= 2 for names in there[:3])
        expected = enough and (there[1] == there[2] or there[2] == there[3])
        driver, coordinator = attempt(plan, data, key, silent, order)
        outcome = coordinator.outcome
        assert outcome.closed == expected, (silent, outcome)
        if not expected:
            assert outcome.reason
            continue
        closed += 1
        members = [int(id.rpartition(".")[2]) for id in outcome.accepted]
        assert members == sorted(there[2])
        driver.step(1, [(0, 0)] * len(members), lambda version: None)
        mean = (sum(own[n] for n in members) / UNIT / len(members)).astype(np.float32)
        assert driver.server.state["params"].tobytes() == (before + mean).tobytes(), silent
    # All three stay for the sum: 2^3 ways; two do, and the third is gone before the sums.
    assert closed == 8 + 3 * (2 * 4 + 1)


def state_of(world):
    return world.version()["state"]


def undisturbed(root, plan=None):
    world = World(root, plan)

    async def story():
        async with world.process() as loop:
            await world.go_on(loop)

    asyncio.run(story())
    return world


def test_served_in_process_it_is_the_simulation(room):
    world = undisturbed(room / "w", plan_of(rounds=2))
    run = world.plan.simulate(world.data, seed=0, engine="sequential(workers=1)")
    vectors = world.loop.models.vectors(state_of(world))
    assert vectors["state/params"].tobytes() == run.model["params"].tobytes()
    assert [*world.asked] == [(r, 0, step) for r in (1, 2) for step in range(4)]
    assert len(world.answers()) == 2 * 4 * 3
    # What is kept of the questions goes with the next round's.
    for site in world.root.glob("site-*"):
        assert {path.name[0] for path in (site / "kept").iterdir()} == {"2"}


def walk(root, monkeypatch, who, every):
    """Kill a process at one instant after the other; the number of them."""
    expected = undisturbed(root / "undisturbed")
    at = 0
    while True:
        world, instants = World(root / f"{who}-{at}"), Instants(at)
        if who == "site":
            world.client = instants

        async def story(world=world, instants=instants):
            try:
                async with world.process(instants if who == "server" else None) as loop:
                    await world.go_on(loop)
            except Killed:
                assert who == "server"
                async with world.process() as loop:
                    await world.go_on(loop)

        with killing(monkeypatch, world):
            asyncio.run(story())
        assert state_of(world) == state_of(expected), at
        assert moved(world) == moved(expected), at
        check_answers(world)
        World.close_all()
        shutil.rmtree(world.root)
        if not instants.dead:
            return instants.count
        at += every


def moved(world):
    """Bytes each way, as they are kept of the rounds."""
    store = world.store()
    found = [row["record"] for row in operations.rounds(store)]
    store.close()
    return [(record["bytes_up"], record["bytes_down"]) for record in found]


def check_answers(world):
    """All answered all; and what was sent for a question was the same, however often."""
    assert len(world.answers()) == 12
    assert [*world.asked] == [(1, 0, step) for step in range(4)]
    for name, site in world.sites.items():
        assert not [*(site.folder / "outbox").iterdir()]
        sent = world.sent[name]
        assert len({(assignment, step) for assignment, step, _ in sent}) == len(set(sent)) == 4


def test_a_server_killed_between_any_two_steps_that_last(room, monkeypatch):
    assert walk(room, monkeypatch, "server", 11) > 90


@pytest.mark.slow
def test_a_server_killed_at_every_step_that_lasts(room, monkeypatch):
    assert walk(room, monkeypatch, "server", 1) > 90


def test_a_site_killed_between_any_two_steps_that_last(room, monkeypatch):
    assert walk(room, monkeypatch, "site", 7) > 40


@pytest.mark.slow
def test_a_site_killed_at_every_step_that_lasts(room, monkeypatch):
    assert walk(room, monkeypatch, "site", 1) > 40


def stories(root, plan, story, **service):
    """Tell a story of one server's process; its world."""
    world = World(root / "world", plan)

    async def told():
        async with world.process(**service) as loop:
            loop.tick()
            await settled(loop)
            await story(world, loop)

    asyncio.run(told())
    return world


def closed_alone(root, plan, members):
    """The state that an undisturbed federation of these members alone comes to."""
    plan = replace(plan, schedule=replace(plan.schedule, minimum=1, attempts=1))
    silent = {name for name in "012" if name not in members}
    world = World(root / "alone", plan)

    async def story():
        async with world.process() as loop:
            loop.tick()
            await settled(loop)
            for name in silent:
                assert loop.give_up(name, loop.open[name]["id"], "not there")
            await settled(loop)
            await world.go_on(loop)

    asyncio.run(story())
    assert world.version()["version"] == 1
    return state_of(world)


def attempts_of(world):
    """State and reason of every attempt at a round."""
    store = world.store()
    found = [(row["state"], row["reason"]) for row in operations.rounds(store)]
    store.close()
    return found


def audited(world, event):
    store = world.store()
    with store.reading() as connection:
        found = [json.loads(each.detail) for each in lines(connection) if each.event == event]
    store.close()
    return found


def silent_at(**exchanges):
    """Whoever is silent from a question on."""
    return lambda name, order: order.exchange >= exchanges.get(f"s{name}", 9)


def later(world, loop, seconds):
    """Time passes, under the server's eyes."""
    end = world.now + seconds
    while world.now < end:
        world.now = min(world.now + 20, end)
        loop.tick()


async def give_up(loop, name):
    assert loop.give_up(name, loop.open[name]["id"], "it went silent")
    await settled(loop)


def test_an_attempt_that_cannot_be_closed_is_abandoned_and_the_next_one_closes(room):
    """Site 2 is gone before its update, site 1 before it could give the masks away."""

    async def story(world, loop):
        await world.go_on(loop, silent_at(s2=2))
        await give_up(loop, "2")
        await world.go_on(loop, silent_at(s1=3))
        assert loop.question.name == "unmask"
        await give_up(loop, "1")
        assert loop.coordinator.attempt == 1
        assert loop.failed is None
        app = App(b"", "p", "t")
        app.loop = loop
        shown.append(json.dumps(await ServedSource(app).since("federation", 0)))
        await world.go_on(loop)

    shown = []
    world = stories(room, plan_of(), story)
    (first, reason), (second, _) = attempts_of(world)
    assert (first, second) == ("abandoned", "closed")
    assert "Masked" in reason and "masks of those who are gone are not all known" in reason
    assert json.dumps(reason).strip('"') in shown[0]
    (line,) = audited(world, "round abandoned")
    assert line == {"round": 1, "reason": reason}
    assert state_of(world) == state_of(undisturbed(room / "undisturbed"))
    assert ("abandoned: " + reason) in (world.root / "run" / "refusals.jsonl").read_text()


def test_given_up_it_goes_on_with_more_attempts(room):
    """Every attempt fails; the process is started again, in vain, then with more attempts."""
    plan = plan_of(attempts=2)
    world = World(room / "w", plan)

    async def doomed(loop):
        for _ in range(2):
            await world.go_on(loop, silent_at(s2=2))
            await give_up(loop, "2")
            await world.go_on(loop, silent_at(s1=3))
            await give_up(loop, "1")

    async def story():
        async with world.process() as loop:
            await doomed(loop)
            assert loop.coordinator.phase is Phase.FAILED and loop.done
        async with world.process() as loop:
            await world.go_on(loop)
            assert loop.coordinator.phase is Phase.FAILED and loop.done
        world.plan = replace(plan, schedule=replace(plan.schedule, attempts=3))
        for name in "012":
            world.start_site(name)
        async with world.process() as loop:
            await world.go_on(loop)
            assert loop.version["version"] == 1

    asyncio.run(story())
    assert [state for state, _ in attempts_of(world)] == ["abandoned", "abandoned", "closed"]
    assert state_of(world) == state_of(undisturbed(room / "undisturbed"))


@pytest.mark.parametrize("again", [False, True], ids=["", "restarted"])
def test_fewer_than_a_reducer_needs_are_no_aggregate(room, again):
    """It needs four of three."""
    plan = plan_of(Masked(few=4), attempts=2)
    world = World(room / "w", plan)

    async def story():
        for _ in range(2 if again else 1):
            async with world.process() as loop:
                for _ in range(1 if again else 2):
                    loop.tick()
                    await settled(loop)
                    assert not loop.open
                assert loop.failed is None
        assert loop.coordinator.phase is Phase.FAILED

    asyncio.run(story())
    assert [state for state, _ in attempts_of(world)] == ["abandoned"] * 2
    assert all("at least 4 updates are needed" in reason for _, reason in attempts_of(world))


def test_fewer_than_the_next_question_needs_are_no_aggregate(room):
    async def story(world, loop):
        await world.go_on(loop, silent_at(s1=1, s2=1))
        await give_up(loop, "1")
        await give_up(loop, "2")
        assert loop.coordinator.attempt == 1 and loop.failed is None
        await world.go_on(loop)

    world = stories(room, plan_of(minimum=1), story)
    assert [state for state, _ in attempts_of(world)] == ["abandoned", "closed"]


@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize("exchange", range(4))
def test_a_deadline_in_the_middle(room, exchange, restart):
    """Site 2 is silent from a question on; the deadline of that question ends it, not before."""
    plan = plan_of(Masked(few=2), deadline=60.0, minimum=2, attempts=1)
    world = World(room / "w", plan)
    silent = silent_at(s2=exchange)

    async def past_the_deadline(loop):
        later(world, loop, 31)
        await settled(loop)
        await world.go_on(loop, silent)

    async def story():
        async with world.process() as loop:
            await world.go_on(loop, silent)
            assert [*loop.open] == ["2"]
            later(world, loop, 30)
            assert [*loop.open] == ["2"]
            if not restart:
                await past_the_deadline(loop)
        async with world.process() as loop:
            if restart:
                assert [*loop.open] == ["2"]
                await past_the_deadline(loop)
            assert loop.version["version"] == 1

    asyncio.run(story())
    members = "01" if exchange < 3 else "012"
    assert state_of(world) == closed_alone(room, plan, members)
    # Whose update was accepted and who then fell silent is in the round all the same.
    assert [loop_memory(world, name) for name in "012"] == [
        "1.0.0", "1.0.1", "1.0.2" if exchange == 3 else None
    ]  # fmt: skip


def loop_memory(world, name):
    store = world.store()
    found = ledger.last_counted(store, name, 1)
    store.close()
    return found


@pytest.mark.parametrize("exchange", range(4))
def test_a_site_revoked_in_the_middle(room, exchange):
    plan = plan_of()

    async def story(world, loop):
        await world.go_on(loop, silent_at(s2=exchange))
        assert [*loop.open] == ["2"]
        with loop.store.change() as change:
            operations.revoke(change, "root", "2")
        loop.revoked("2")
        await settled(loop)
        await world.go_on(loop, lambda name, order: name == "2")

    world = stories(room, plan, story)
    assert world.version()["version"] == 1
    assert state_of(world) == closed_alone(room, plan, "01" if exchange < 3 else "012")


def test_a_site_revoked_between_two_questions_is_not_waited_for(room):
    """It has answered, and would be asked next."""
    plan = plan_of()

    async def story(world, loop):
        await world.go_on(loop, silent_at(s0=1, s1=1, s2=1))
        with loop.store.change() as change:
            operations.revoke(change, "root", "2")
        loop.tick()
        await settled(loop)
        assert set(loop.open) == {"0", "1"}
        await world.go_on(loop, lambda name, order: name == "2")

    world = stories(room, plan, story)
    assert state_of(world) == closed_alone(room, plan, "01")


def test_whoever_joins_in_the_middle_waits_for_the_next_round(room):
    world = World(room / "w", plan_of(rounds=2), "01")

    async def story():
        async with world.process(sites=2) as loop:
            loop.tick()
            await settled(loop)
            await world.go_on(loop, silent_at(s0=2, s1=2))
            world.now += 1
            world.join("2")
            loop.tick()
            order = await world.order(loop, "2")
            assert order.kind == "wait"
            assert set(loop.open) == {"0", "1"}
        async with world.process(sites=2) as loop:
            await world.go_on(loop)
            assert loop.version["version"] == 2

    asyncio.run(story())
    rows = [each.split(".")[0::2] for each, step in world.answers() if step == 3]
    assert sorted(rows) == [["1", "0"], ["1", "1"], ["2", "0"], ["2", "1"], ["2", "2"]]


def test_who_comes_too_late_for_a_later_question_stays_in_the_round(room):
    """Its update was taken; the answer to what was asked next comes when that is over."""
    plan = plan_of(Asking(questions=2), deadline=60.0)

    async def story(world, loop):
        await world.go_on(loop, silent_at(s2=1, s0=2, s1=2))
        data = b"".join(bytes(p) for p in pack(Update({"echo": np.array([0, 2])})))
        row = loop.open["2"]
        late = loop.offer("2", row["id"], len(data), sha256(data).hexdigest(), 1)
        loop.models.part(late["id"]).write_bytes(data)
        later(world, loop, 61)
        await settled(loop)
        assert loop.coordinator.step == 2 and set(loop.open) == {"0", "1"}
        answer = await loop.deliver(late)
        assert not answer.accepted
        await world.go_on(loop)
        assert loop.version["version"] == 1
        (closed,) = loop.history.closed
        assert closed.record.accepted == 3

    world = stories(room, plan, story)
    assert loop_memory(world, "2") == "1.0.2"
    assert state_of(world) == closed_alone(room, plan, "012")


def test_whoever_is_too_late_while_the_step_is_made_is_told_so(room, monkeypatch):
    """Between the last answer and the next round no question is open."""
    plan = plan_of(Mean(), cohort=2, invite=3)
    world, going = World(room / "w", plan), threading.Event()

    async def story():
        async with world.process(sites=3) as loop:
            step = loop.models.step

            def slow(work):
                going.wait(20)
                return step(work)

            monkeypatch.setattr(loop.models, "step", slow)
            loop.tick()
            late = {name: row["id"] for name, row in loop.open.items()}
            for name in "01":
                order = await world.order(loop, name)
                await asyncio.to_thread(world.sites[name]._train, order)
            await asyncio.sleep(0.1)
            data = b"x" * 100
            answer = await offer(loop, "2", late["2"], 0, data)
            assert not answer.accepted and answer.reason
            going.set()
            await settled(loop)
            assert loop.version["version"] == 1

    asyncio.run(story())


def test_what_an_abandoned_attempt_had_to_sum_is_not_in_the_next(room, monkeypatch):
    """An update waits to be summed while its attempt is abandoned and the next one begins."""
    plan = plan_of(Mean())

    async def story(world, loop):
        fold, going = loop.models.fold, threading.Event()

        def slow(*given):
            going.wait(20)
            fold(*given)

        monkeypatch.setattr(loop.models, "fold", slow)
        order = await world.order(loop, "0")
        await asyncio.to_thread(world.sites["0"]._train, order)
        for name in "12":
            assert loop.give_up(name, loop.open[name]["id"], "it went silent")
        assert loop.coordinator.attempt == 1
        loop.tick()
        await asyncio.sleep(0.05)
        loop.tick()
        going.set()
        await settled(loop)
        await world.go_on(loop)
        (closed,) = loop.history.closed
        assert closed.record.accepted == 3

    world = stories(room, plan, story)
    expected = undisturbed(room / "undisturbed", plan)
    assert state_of(world) == state_of(expected)


def test_a_deadline_that_passes_while_a_question_is_put_down_leaves_nobody_asked(room, monkeypatch):
    plan = plan_of(deadline=60.0)
    world = World(room / "w", plan)

    async def story():
        async with world.process() as loop:
            hand_out, going = loop.models.hand_out, threading.Event()

            def slow(tree):
                going.wait(20)
                return hand_out(tree)

            monkeypatch.setattr(loop.models, "hand_out", slow)
            loop.tick()
            await asyncio.sleep(0.05)
            later(world, loop, 61)
            assert loop.coordinator.attempt == 1
            going.set()
            await settled(loop)
            assert not loop.open
            await world.go_on(loop)
            assert loop.version["version"] == 1

    asyncio.run(story())


def hostile(fill):
    def pack_it(world, loop, name):
        vector = np.full(world.plan.schema.vectors["delta"].size, fill, np.float32)
        return b"".join(bytes(piece) for piece in pack(Update({"delta": vector})))

    return pack_it


@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted"])
def test_what_cannot_be_summed_abandons_an_attempt_and_ends_no_federation(room, restart):
    plan = plan_of(Fragile(questions=1), attempts=3)
    world = World(room / "w", plan)

    async def story():
        async with world.process() as loop:
            loop.tick()
            data = hostile(1000.0)(world, loop, "2")
            answer = await offer(loop, "2", loop.open["2"]["id"], 0, data)
            assert answer.accepted  # it is of the schema
            await settled(loop)
            if not restart:
                await world.go_on(loop)
        if restart:
            async with world.process() as loop:
                await world.go_on(loop)

    asyncio.run(story())
    (first, reason), (second, _) = attempts_of(world)
    assert (first, second) == ("abandoned", "closed")
    assert "2 could not be summed (IndexError: a place that is not there)" in reason
    assert state_of(world) == state_of(undisturbed(room / "undisturbed", plan))


@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted"])
def test_a_conversation_that_cannot_even_begin_is_abandoned(room, restart):
    world = World(room / "w", plan_of(Early(questions=1), attempts=2), "01")

    async def story():
        async with world.process(sites=2) as loop:
            loop.tick()
            await settled(loop)
            assert loop.coordinator.attempt == 1
            if restart:
                return
            world.now += 1
            world.join("2")
            loop.members.saw("2")
            await world.go_on(loop)
            assert loop.version["version"] == 1

    asyncio.run(story())
    if restart:
        world.now += 1
        world.join("2")

        async def again():
            async with world.process(sites=2) as loop:
                await world.go_on(loop)
                assert loop.version["version"] == 1

        asyncio.run(again())
    (first, reason), (second, _) = attempts_of(world)
    assert (first, second) == ("abandoned", "closed")
    assert "two are not enough to hide among" in reason
