"""Secrets: what is drawn in secret nobody else can draw, and the keys are nowhere to be found."""

from __future__ import annotations

import asyncio
import json
import tarfile
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import sqlalchemy as sa
from attacker import Inner
from processes import World, killing, plan_of
from test_conversations import Instants, Killed, room, state_of, undisturbed  # noqa: F401
from test_hostile import example

from atoll.aggregation import Clip, Mean, Stage
from atoll.core import safetensors
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.protocol import messages
from atoll.rounds.messages import pack, unpack
from atoll.rounds.server import Server
from atoll.rounds.task import ClientTask, Received, run_task
from atoll.service.http.app import App
from atoll.service.http.watching import ServedSource
from atoll.service.storage.tables import metadata

pytest.importorskip("sklearn")
STD = 0.05
NAMES = "012"


@dataclass(frozen=True)
class LocalNoise(Stage):
    """Every client adds noise of its own."""

    std: float

    secret = True

    def encode(self, update, told, memory, key):
        delta = update.vectors["delta"]
        noise = np.float32(self.std) * key.generator().standard_normal(delta.shape, np.float32)
        return replace(update, vectors={"delta": delta + noise}), memory


@dataclass(frozen=True)
class OpenNoise(LocalNoise):
    """The same with numbers that everyone can draw."""

    secret = False


def central(multiplier=0.3):
    return Clip(0.5) >> Mean() >> example("central_noise").CentralNoise(multiplier)


def run(root, plan):
    return undisturbed(root, plan)


def params(world, version):
    store = world.store()
    row = store.version(version)
    store.close()
    data = b"".join(world.loop.models.blobs.read(row["state"]))
    return safetensors.decode(data)[0]["state/params"]


@pytest.mark.parametrize("where", ["clients", "server"])
def test_two_federations_of_one_seed_draw_other_secrets(room, where):  # noqa: F811
    pipeline = LocalNoise(STD) >> Mean() if where == "clients" else central()
    plan = plan_of(pipeline, rounds=2)
    found = [params(run(room / name, plan), 2) for name in ("one", "two")]
    found.append(plan.simulate(World.made[-1].data, seed=0).model["params"])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        apart = np.std(found[one] - found[other])
        assert apart > 0.01, (one, other)


@pytest.mark.parametrize("pipeline", [Clip(0.5) >> Mean(), OpenNoise(STD) >> Mean()], ids=str)
def test_without_secrets_nothing_differs(room, pipeline):  # noqa: F811
    plan = plan_of(pipeline, rounds=2)
    one, two = run(room / "one", plan), run(room / "two", plan)
    assert state_of(one) == state_of(two)
    assert one.bytes == two.bytes
    simulated = plan.simulate(one.data, seed=0, engine="sequential(workers=1)")
    assert params(one, 2).tobytes() == simulated.model["params"].tobytes()


def keys_from_the_seed(seed, digests=("",)):
    """Every key that anybody who knows the plan and the seed can think of."""
    root = Key(seed)
    for round, place in product(range(4), range(5)):
        for end in ((), *((digest,) for digest in digests)):
            yield root.fold("release", round, *end).fold("stage", place)
            for attempt in range(2):
                reduced = root.fold("release", round, *end).fold("attempt", attempt)
                yield reduced.fold("reduce")
                yield reduced.fold("stage", place)
            yield root.fold("release", round, *end).fold("reduce")
        for client in NAMES:
            for inner in ("encode", "exchange"):
                yield root.fold("work", round, client).fold(inner).fold("stage", place)
                yield root.fold("work", round, client).fold(inner)
                asked = root.fold("work", round, client).fold("question", place)
                yield asked.fold(inner).fold("stage", 0)
    yield root


def left_over(noise, std, keys):
    """The least that is left of some noise when what a key draws is taken off, in units of std."""
    own = [
        np.std(noise - np.float32(std) * key.generator().standard_normal(noise.shape, np.float32))
        for key in keys
    ]
    return min(own) / std


def the_update(plan, world, name, before):
    """What a client would report without noise, as whoever knows its data could work out."""
    plain = replace(plan, pipeline=Clip(0.5) >> Mean() if "Clip" in str(plan.pipeline) else Mean())
    received = Received.of(plain, {"algorithm": {"params": before}})
    member = world.data.names.index(name)
    task = ClientTask.read([member, name, 1, 1, 1.0, 1.0, 0], Key(0), {})
    return run_task(plain, received, task, world.data.train(member))[0].vectors["delta"]


def test_a_site_that_knows_all_it_is_told_cannot_take_off_central_noise(room):  # noqa: F811
    """It even knows the data of all others; the same attack succeeds where noise is open."""
    plan = plan_of(central(), rounds=1)
    world = run(room / "w", plan)
    for served in (True, False):
        before, after = params(world, 0), params(world, 1)
        if not served:
            after = plan.simulate(world.data, seed=0, engine="sequential").model["params"]
        rows = [the_update(plan, world, name, before) for name in NAMES]
        mean = np.mean(np.stack(rows).astype(float), axis=0)
        noise = (after - before - mean).astype(np.float32)
        std = 0.3 * 0.5 / 3
        told = [world.version()[name] for name in ("state", "broadcast", "model")]
        left = left_over(noise, std, keys_from_the_seed(0, told))
        if served:
            assert np.std(noise) == pytest.approx(std, rel=0.1)
            assert left == pytest.approx(np.sqrt(2), rel=0.15)  # two noises, rather than none
        else:
            assert left < 0.01


def test_the_server_cannot_take_off_local_noise(room):  # noqa: F811
    """Though it knows the message, the model, the seed and, here, the very data."""
    plan = plan_of(LocalNoise(STD) >> Mean(), rounds=1)
    world = run(room / "w", plan)
    before = params(world, 0)
    for name in NAMES:
        message = unpack(world.bytes[f"1.0.{name}", 0])
        noise = message.vectors["delta"] - the_update(plan, world, name, before)
        assert np.std(noise) == pytest.approx(STD, rel=0.1)
        store = world.store()
        secret = Key(int(store.setting("secret")))
        told = [store.version(0)["broadcast"]]
        store.close()
        own = [secret, *(secret.fold(*key.path) for key in keys_from_the_seed(0, told))]
        assert left_over(noise, STD, keys_from_the_seed(0, told)) > 1.2
        assert left_over(noise, STD, own) > 1.2
    # The same attack, where the noise is not secret.
    plan = plan_of(OpenNoise(STD) >> Mean(), rounds=1)
    world = run(room / "open", plan)
    message = unpack(world.bytes["1.0.0", 0])
    noise = message.vectors["delta"] - the_update(plan, world, "0", before)
    assert left_over(noise, STD, keys_from_the_seed(0)) < 0.01


def test_another_question_is_another_key(room):  # noqa: F811
    """Whoever asks again, with another model or anything else, gets other noise; or the same."""
    world = World(room / "w", plan_of(LocalNoise(STD) >> Mean()))
    site = world.sites["0"]
    order = messages.Order("train", "1.0.0", round=1, turn=1, model="a" * 64)
    others = [
        {"model": "b" * 64}, {"assignment": "1.1.0"}, {"told": "a" * 64}, {"mail": "a" * 64},
        {"exchange": 1}, {"told": "a" * 64, "model": None}, {"mail": "a" * 64, "model": None},
    ]  # fmt: skip
    import msgspec

    found = [site._assignment(order).secret.digest()]
    for changed in others:
        again = msgspec.structs.replace(order, **changed)
        found.append(site._assignment(again).secret.digest())
    assert len(set(found)) == len(found)
    world.start_site("0")
    assert world.sites["0"]._assignment(order).secret.digest() == found[0]
    assert world.sites["1"]._assignment(order).secret.digest() not in found
    # What everyone may know does not depend on any of it.
    assert site._assignment(order).key == Key(0).fold("work", 1, "0")


def test_the_server_never_draws_the_same_for_other_updates():
    plan = plan_of(central())
    drawn = []
    for round, digest, secret in ((1, "a", 1), (1, "b", 1), (2, "a", 1), (1, "a", 2), (1, "a", 1)):
        server = Server(plan, Key(0), Key(secret))
        sums = plan.stages.open()
        zeros = np.zeros(plan.schema.vectors["delta"].size, np.float32)
        sums.add(Update({"delta": zeros}), ("0", 1))
        before = server.state["params"]
        aggregate = plan.stages.close(sums, 3, server.stages, Key(9))
        server.close(round, aggregate, digest=digest)
        drawn.append((server.state["params"] - before).tobytes())
    assert len(set(drawn[:4])) == 4
    assert drawn[4] == drawn[0]


def test_after_a_crash_the_same_is_drawn(room, monkeypatch):  # noqa: F811
    """The server and its sites are killed here and there; given their keys, the bytes agree."""
    plan = plan_of(Clip(0.5) >> LossyNoise(STD) >> Mean() >> open_or_not(), rounds=1)
    expected = World(room / "e", plan)
    give_keys(expected)

    async def story(world, instants):
        try:
            async with world.process(instants) as loop:
                await world.go_on(loop)
        except Killed:
            async with world.process() as loop:
                await world.go_on(loop)

    asyncio.run(story(expected, None))
    for at in range(0, 60, 4):
        world, instants = World(room / f"w{at}", plan), Instants(at)
        give_keys(world)
        world.client = Instants(at // 2)
        with killing(monkeypatch, world):
            asyncio.run(story(world, instants))
        assert state_of(world) == state_of(expected), at
        if not instants.dead:
            break
    assert at > 20


@dataclass(frozen=True)
class LossyNoise(LocalNoise):
    """The server clips what comes through it once more."""

    lossy = True

    def bound(self, bounds, state):
        return bounds


def open_or_not():
    return example("central_noise").CentralNoise(0.3)


def give_keys(world):
    store = world.store()
    with store.change(leading=False) as change:
        change.set("secret", "12345678901234567890")
    store.close()
    for name in NAMES:
        (world.sites[name].folder / "secret.key").write_bytes(bytes([int(name)]) * 32)
        world.start_site(name)


def traces(secret):
    """How a key of 256 bits could be written down."""
    number = secret if isinstance(secret, int) else int.from_bytes(secret, "little")
    raw = number.to_bytes(32, "little")
    return [
        str(number).encode(), f"{number:x}".encode(), raw, raw[::-1], raw.hex().encode(),
        raw[::-1].hex().encode(), f"{number:X}".encode(),
    ]  # fmt: skip


def holds(data, secret):
    return any(trace in data for trace in traces(secret))


def test_the_keys_are_nowhere_else(room, caplog):  # noqa: F811
    caplog.set_level("DEBUG")
    plan = plan_of(LocalNoise(STD) >> Clip(5.0) >> Mean() >> open_or_not(), rounds=2)
    world, said = World(room / "w", plan), []
    for site in world.sites.values():
        site.report = said.append

    async def story():
        async with world.process() as loop:
            await world.go_on(loop)
            app = App(b"", "p", "t")
            app.loop = loop
            source = ServedSource(app)
            run = "federation"
            said.append(await source.about(run))
            said.append(await source.since(run, 0))
            said.append(await source.clients(run))
            said.append(await source.participants(run, 1))
            said.append(repr(loop.plan))

    asyncio.run(story())
    store = world.store()
    server = int(store.setting("secret"))
    rows = {name: [*store.rows(sa.select(table))] for name, table in metadata.tables.items()}
    store.close()
    secrets = {name: (world.sites[name].folder / "secret.key").read_bytes() for name in NAMES}
    assert len({server.to_bytes(32, "little"), *secrets.values()}) == 4
    # In the database it is in one place; elsewhere it is not.
    (mine,) = [row for row in rows["settings"] if row["name"] == "secret"]
    assert holds(mine["value"].encode(), server)
    rows["settings"].remove(mine)
    text = repr([rows, said, caplog.text]).encode()
    files = {
        path: path.read_bytes()
        for path in world.root.rglob("*")
        if path.is_file() and not path.name.startswith("x.db")
    }
    for secret in (server, *secrets.values()):
        assert not holds(text, secret)
        where = [path for path, data in files.items() if holds(data, secret)]
        assert [path.name for path in where] == ([] if secret == server else ["secret.key"])
    for name in NAMES:
        assert (world.sites[name].folder / "secret.key").stat().st_mode & 0o077 == 0


def test_the_servers_key_is_not_told_over_http(tmp_path, caplog):
    caplog.set_level("DEBUG")
    plan = plan_of(central())
    served = Inner(tmp_path, plan, sites=2)
    try:
        site, other = served.insider("a").open(), served.insider("b").open()
        admin = served.insider("root", "admin").open()
        other.order()
        for each in (site, other):
            order = each.assignment()
            zeros = np.zeros(plan.schema.vectors["delta"].size, np.float32)
            data = b"".join(map(bytes, pack(Update({"delta": zeros}))))
            each.upload(order["assignment"], data)
        end = site.order(5.0)
        while end["kind"] != "stop":
            end = site.order(5.0)
        heard = [json.dumps(order), json.dumps(end), served.metrics(), caplog.text]
        for target in ("/v1/status", "/v1/rounds", "/v1/sites"):
            answer = admin.ask("GET", target)
            assert answer.status == 200
            heard.append(answer.data.decode())
        heard += [json.dumps(served.audit())]
        (row,) = [row for row in served.rows("settings") if row["name"] == "secret"]
        secret = int(json.loads(row["value"]))
        blobs = [order["model"], end["model"], served.rows("versions")[-1]["broadcast"]]
        bodies = [site.ask("GET", f"/v1/blobs/{digest}") for digest in blobs]
        assert {body.status for body in bodies} == {200}
        # What the server keeps to go on from is not handed out.
        state = served.rows("versions")[-1]["state"]
        assert site.ask("GET", f"/v1/blobs/{state}").status == 404
        for data in (*(text.encode() for text in heard), *(body.data for body in bodies)):
            assert not holds(data, secret)
        size = served.folder.backup(tmp_path / "backup.tar")
        assert size > 0
    finally:
        served.close()
    with tarfile.open(tmp_path / "backup.tar") as backup:
        inside = {m.name: backup.extractfile(m).read() for m in backup if m.isfile()}
    where = [name for name, data in inside.items() if holds(data, secret)]
    assert where and all(name.endswith(".db") for name in where), where
