"""One history: what a served federation leaves is the run folder that a simulation leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.cli import main
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.federation import invite
from atoll.learners import NumpyLearner
from atoll.rounds import Coordinator, Roster
from atoll.rounds.messages import pack
from atoll.rounds.stopping import Patience
from atoll.service import operations
from atoll.service.history import History
from atoll.service.http.watching import ServedSource
from atoll.service.loop import FederationLoop
from atoll.service.settings import Service
from atoll.service.storage.blobs import Folder
from atoll.service.storage.database import Store
from atoll.service.storage.folder import StateFolder
from atoll.service.storage.tables import sites
from atoll.tracking import find_runs, read_run
from atoll.tracking.reading import in_use, name_of, read_status
from atoll.tracking.tail import LINES, RunTail
from atoll.view.page.folders import FolderRun, FolderSource

# Filters of warnings are the process's: sites in its threads undo each other's.
pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")


def population(clients=3):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    x = rng.normal(size=(90, 2)) + 3 * np.stack([np.cos(2.1 * y), np.sin(2.1 * y)], axis=1)
    whole = data.from_arrays(x.astype(np.float32), y, classes=3, name="blobs")
    return whole.dirichlet(clients=clients, alpha=5.0, seed=0)


def fedavg():
    return Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=4),
        evaluation=Evaluation(clients_every=None),
    )


def batchnorm():
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    torch.manual_seed(0)
    layers = torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 3)
    learner = TorchLearner(torch.nn.Sequential(*layers), lr=0.1, batch_size=10)
    return replace(fedavg(), learner=learner)


def served(make, state):
    """A plan, served to three sites over HTTP in threads of this process; its run."""
    clients, found, leave = population(), {}, [threading.Event() for _ in range(4)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tokens = [invite(state, name) for name in clients.names]
    plans = [make() for _ in range(1 + len(tokens))]

    def server():
        options = {"port": port, "seed": 5, "linger": 30, "test": clients, "stop": leave[-1]}
        found["run"] = plans[-1].serve(state, **options)

    def site(place):
        own, folder = clients.subset([place]), state.parent / f"{state.name}-site-{place}"
        url = f"https://127.0.0.1:{port}"
        plans[place].join(url, own, folder, token=tokens[place], stop=leave[place])

    threads = [threading.Thread(target=server)]
    threads += [threading.Thread(target=site, args=(place,)) for place in range(len(tokens))]
    for thread in threads:
        thread.start()
    threads[0].join(60)
    done = not threads[0].is_alive()
    for each in leave:
        each.set()
    for thread in threads:
        thread.join(20)
    assert done
    return found["run"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plan served and simulated: root/hospitals is a state folder, root/alone a run folder."""
    root = tmp_path_factory.mktemp("runs")
    run = served(fedavg, root / "hospitals")
    simulated = fedavg().simulate(population(), seed=5, folder=root / "alone")
    return SimpleNamespace(root=root, served=run, simulated=simulated)


def timeless(record):
    return replace(record, clock=0.0)


def same(mine, theirs):
    """Whether two runs are the same in everything but time."""
    assert list(map(timeless, mine.history)) == list(map(timeless, theirs.history))
    assert mine.model.keys() == theirs.model.keys()
    for name, vector in mine.model.items():
        assert vector.tobytes() == theirs.model[name].tobytes(), name
    assert (mine.seed, mine.rounds, mine.metrics) == (theirs.seed, theirs.rounds, theirs.metrics)
    assert mine.config == theirs.config


def impatient():
    """Its first model is the best, and by the end no longer among the latest few."""
    return replace(
        fedavg(),
        learner=NumpyLearner(layers=(2, 3), lr=2.0, batch_size=10),
        schedule=schedules.Synchronous(rounds=12),
        evaluation=Evaluation(best="loss", clients_every=None),
        stop=Patience(6, "loss"),
    )


def test_the_best_model_is_kept_beside_the_final_one(tmp_path):
    run = served(impatient, tmp_path / "hospitals")
    simulated = impatient().simulate(population(), seed=5, folder=tmp_path / "alone")
    same(run, simulated)
    assert len(run.history) == 7 and "loss" in run.stopped
    assert run.stopped == simulated.stopped == read_run(tmp_path / "alone").stopped
    (number, model), (_, theirs) = run.best(), simulated.best()
    assert number == 1 == read_run(tmp_path / "hospitals").best()[0]
    assert model["params"].tobytes() == theirs["params"].tobytes() != run.model["params"].tobytes()


def test_a_served_run_is_the_simulated_one_but_for_time(runs):
    assert len(runs.served.history) == 4 and runs.served.metrics["accuracy"] > 0.5
    same(runs.served, runs.simulated)
    same(read_run(runs.root / "hospitals"), read_run(runs.root / "alone"))
    clocks = [record.clock for record in runs.served.history]
    assert clocks == sorted(clocks) and clocks[0] > 0 and runs.served.seconds > 0
    parts = [
        [sorted(closed.participants) for closed in RunTail(folder).read()]
        for folder in (runs.root / "hospitals" / "run", runs.root / "alone")
    ]
    assert parts[0] == parts[1] and len(parts[0][0]) == 3
    assert read_status(runs.root / "hospitals" / "run") == "finished"


def test_model_statistics_are_in_it(tmp_path):
    run = served(batchnorm, tmp_path / "state")
    simulated = batchnorm().simulate(population(), seed=5, folder=tmp_path / "alone")
    assert set(run.model) == {"params", "buffers", "counters"}
    same(run, simulated)


def test_the_page_has_the_same_rows(runs):
    mine, theirs = (FolderRun(runs.root / name) for name in ("hospitals/run", "alone"))
    (rows, state), (others, other) = mine.since(0), theirs.since(0)
    time = ("seconds", "phases", "clock")
    assert [list(row) for row in rows] == [list(row) for row in others]
    assert [{k: v for k, v in row.items() if k not in time} for row in rows] == [
        {k: v for k, v in row.items() if k not in time} for row in others
    ]
    assert all(row["phases"].keys() == {"clients", "step", "evaluation"} for row in rows + others)
    # Its clock is no simulated time, which the page would draw along.
    assert all(row["clock"] is None and row["seconds"] > 0 for row in rows)
    assert (state["status"], state["total"]) == (other["status"], other["total"])
    names = ("name", "accepted", "missed", "up", "down", "last")
    totals = [
        sorted([client[name] for name in names] for client in run.clients())
        for run in (mine, theirs)
    ]
    assert totals[0] == totals[1] and len(totals[0]) == 3
    key = lambda part: part["client"]  # noqa: E731
    assert sorted(mine.participants(2), key=key) == sorted(theirs.participants(2), key=key)


def test_a_state_folder_is_shown_as_a_run(runs, capsys):
    assert main(["show", str(runs.root / "hospitals")]) == 0
    text = capsys.readouterr().out
    assert "finished, seed 5" in text and "hospitals" in text and "4 of 4" in text
    for word in ("None", "engine", "simulated"):
        assert word not in text
    assert main(["show", "hospitals", "--runs", str(runs.root), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [record.json() for record in runs.served.history]
    assert main(["runs", "--runs", str(runs.root)]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == [["hospitals", "finished"], ["alone", "finished"]]
    # One that was not served yet has nothing to show.
    StateFolder.make(runs.root / "new", "new", ["::1"])
    assert main(["show", str(runs.root / "new")]) == 1
    assert "has not been served yet" in capsys.readouterr().err


def test_it_is_compared_with_its_simulation(runs, capsys):
    pytest.importorskip("matplotlib")
    picture = runs.root / "both.png"
    names = [str(runs.root / name) for name in ("hospitals", "alone")]
    assert main(["compare", *names, "--plot", str(picture)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    (mine,) = (row for row in rows if row[0] == "hospitals")
    (theirs,) = (row for row in rows if row[0] == "alone")
    # All but the name and the time.
    assert mine[1:-2] == theirs[1:-2] and picture.stat().st_size > 1000
    # What differs is about the data, never about the plan.
    settings = {row[0] for row in rows[rows.index(theirs) + 1 :]} - {"setting", "drawn:"}
    assert {name.partition(".")[0] for name in settings} == {"data"}


@pytest.mark.parametrize("name", ["hospitals", "alone"])
def test_it_is_reported_on(runs, name, capsys):
    pytest.importorskip("matplotlib")
    path = runs.root / f"{name}.html"
    assert main(["report", str(runs.root / name), "--output", str(path)]) == 0
    text = path.read_text()
    who = "site" if name == "hospitals" else "client"
    assert f"3 {who}s trained together for 4 rounds with FedAvg" in text
    assert f"<h1>{'hospitals' if who == 'site' else 'alone: blobs'}</h1>" in text
    assert "simulated time" not in text
    model = next((runs.root / name).rglob("model.safetensors"))
    assert sha256(model.read_bytes()).hexdigest() in text
    # What the server was called with may hold a password.
    assert ("It was run by" in text) == (name == "alone")


def test_names_of_runs(runs):
    assert {name_of(path) for path in find_runs(runs.root)} == {"hospitals", "alone"}
    source = FolderSource(runs.root / "hospitals", "hospitals")
    (only,) = asyncio.run(source.runs())
    assert (only["id"], only["first"]) == ("hospitals", True)
    assert asyncio.run(source.about("hospitals"))["name"] == "hospitals"


class World:
    """A store, blobs, a run folder, a clock, and sites by name."""

    def __init__(self, root, names="abc", **schedule):
        self.root, self.now = root, 1000.0
        (root / "incoming").mkdir()
        plan = {"rounds": 3, "pause": 0.0, **schedule}
        kind = schedules.Buffered if "buffer" in plan else schedules.Synchronous
        if "buffer" in plan:
            del plan["pause"]
        self.plan = replace(fedavg(), schedule=kind(**plan))
        with self.store() as store, store.change(leading=False) as change:
            for name in names:
                change.run(
                    sites.insert().values(
                        name=name, key=name, role="site", status="active", joined=1, seen=0,
                        examples=1, about="{}",
                    )
                )  # fmt: skip

    @property
    def folder(self):
        return self.root / "run"

    def store(self):
        return closing(Store(f"sqlite:///{self.root / 'x.db'}"))

    @asynccontextmanager
    async def loop(self):
        with self.store() as store:
            assert store.lead()
            made = FederationLoop(
                self.plan, Service(), store, Folder(self.root / "blobs"), self.root / "incoming",
                clock=lambda: self.now, history=self.folder,
            )  # fmt: skip
            await made.start()
            try:
                yield made
            finally:
                await made.close()
                store.resign()

    async def deliver(self, loop, site, value, wait=True):
        row = loop.open[site]
        delta = np.full(self.plan.learner.layout.size, value, np.float32)
        packed = b"".join(bytes(piece) for piece in pack(Update({"delta": delta}, 1.0)))
        digest = sha256(packed).hexdigest()
        upload = loop.offer(site, row["id"], len(packed), digest, 0)
        loop.models.part(upload["id"]).write_bytes(packed)
        answer = await loop.deliver(upload)
        if wait:
            await asyncio.wait_for(loop._work.join(), 20)
        self.now += 1
        return answer

    def lines(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def contents(self):
        return {name: (self.folder / name).read_bytes() for name in LINES}


async def troubled(world, loop):
    """Two rounds: the first with a site that is lost and an abandoned attempt, the second with an
    update that is refused."""
    loop.tick()
    loop.give_up("a", loop.open["a"]["id"], "not heard of")
    loop.give_up("b", loop.open["b"]["id"], "not heard of")
    loop.tick()
    for site in "abc":
        assert (await world.deliver(loop, site, 1)).accepted
    loop.tick()
    assert not (await world.deliver(loop, "b", np.nan)).accepted
    for site in "ac":
        assert (await world.deliver(loop, site, 2)).accepted


def test_abandoned_attempts_and_refusals_are_in_it(tmp_path):
    world = World(tmp_path, minimum=2)

    async def story():
        async with world.loop() as loop:
            await troubled(world, loop)
            served = ServedSource(SimpleNamespace(leading=lambda: loop, project="p"))
            rows, state = await served.since("federation", 0)
            clients = await served.clients("federation")
            parts = await served.participants("federation", 1)
            # The folder says the same while it grows.
            assert read_status(world.folder) == "running" and in_use(world.folder)
            folder = FolderRun(world.folder)
            theirs, other = folder.since(0)
            assert len(rows) == 2 and state["failed"] == other["failed"] == 4
            for mine, row in zip(rows, theirs, strict=True):
                assert mine | {"seconds": 0, "phases": {}} == row | {"seconds": 0, "phases": {}}
                assert mine["seconds"] == pytest.approx(row["seconds"], abs=1e-6)
            assert state["failures"] == other["failures"]
            assert parts == folder.participants(1)
            totals = ("name", "accepted", "missed", "up", "down", "last", "metrics")
            assert [{name: client[name] for name in totals} for client in clients] == sorted(
                folder.clients(), key=lambda client: client["name"]
            )

    asyncio.run(story())
    run = read_run(world.folder)
    assert [(r.invited, r.accepted, r.attempts) for r in run.history] == [(3, 3, 2), (3, 2, 1)]
    assert [line["round"] for line in world.lines("refusals.jsonl")] == [1, 1, 1, 2]
    assert run.refusals[0] == "a: not heard of" and run.refusals[2].startswith("abandoned: ")
    assert run.refusals[3].startswith("b: ") and "NaN" in run.refusals[3]
    outcomes = [
        sorted(outcome for _, outcome, *_ in line["participants"])
        for line in world.lines("ledger.jsonl")
    ]
    assert outcomes == [
        ["accepted"] * 3 + ["lost", "lost", "no longer needed"],
        ["accepted", "accepted", "malformed"],
    ]
    assert read_status(world.folder) == "interrupted" and not in_use(world.folder)


def cuts(text):
    """A file as kills and clumsy hands leave it: cut at any line or within it, and worse."""
    lines = text.splitlines(keepends=True)
    yield b""
    for place, line in enumerate(lines):
        before = b"".join(lines[:place])
        yield before
        yield before + line[: len(line) // 2]
        yield before + b"".join(lines[place + 1 :])
        yield before + b'{"round":99,"foreign":true}\n' + b"".join(lines[place:])
        yield before + b"{oops\n" + b"".join(lines[place:])


def test_whatever_is_done_to_the_folder_a_start_makes_it_the_databases(tmp_path):
    world = World(tmp_path, minimum=2)

    async def story():
        async with world.loop() as loop:
            await troubled(world, loop)

    asyncio.run(story())
    good = world.contents()
    assert all(good.values())
    with world.store() as store:
        for name, text in good.items():
            for bad in cuts(text):
                (world.folder / name).write_bytes(bad)
                history = History(world.plan, 0, store, world.folder)
                history.begin(2)
                history.close(failed=False, models={})
                assert world.contents() == good, (name, bad)
        for name in [*LINES, "config.json", "status.json"]:
            (world.folder / name).unlink()
        history = History(world.plan, 0, store, world.folder)
        history.begin(2)
        history.close(failed=False, models={})
    assert world.contents() == good and len(read_run(world.folder).history) == 2


def test_a_kill_between_the_decision_and_its_lines_loses_none(tmp_path, monkeypatch):
    world = World(tmp_path)

    def killed(*rest):
        raise SystemExit

    async def cut_off():
        async with world.loop() as loop:
            monkeypatch.setattr(History, "add", killed)
            loop.tick()
            for site in "abc":
                await world.deliver(loop, site, 1, wait=False)
            await asyncio.wait([loop._worker], timeout=20)
            assert loop._worker.done()
            loop._worker = None

    with pytest.raises(SystemExit):
        asyncio.run(cut_off())
    monkeypatch.undo()
    assert world.lines("rounds.jsonl") == []

    async def story():
        async with world.loop() as loop:
            assert [line["round"] for line in world.lines("rounds.jsonl")] == [1]
            loop.tick()
            for site in "abc":
                await world.deliver(loop, site, 1)
            assert loop.version["version"] == 2

    asyncio.run(story())
    assert [record.round for record in read_run(world.folder).history] == [1, 2]


def test_what_goes_wrong_in_the_end_is_told(tmp_path):
    world = World(tmp_path, minimum=2, attempts=1)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            for site in "ab":
                loop.give_up(site, loop.open[site]["id"], "gone")
            served = ServedSource(SimpleNamespace(leading=lambda: loop, project="p"))
            _, state = await served.since("federation", 0)
            assert state["status"] == "failed" and state["failed"] == 3
            assert state["failures"][-1]["text"].startswith("abandoned: ")

    asyncio.run(story())
    run = read_run(world.folder)
    assert read_status(world.folder) == "failed" and run.refusals[-1].startswith("abandoned: ")


def test_a_buffer_that_fills_out_of_turn(tmp_path):
    """Refused in a later round than it began in: told once, and again after a restart."""
    world = World(tmp_path, buffer=1, concurrency=2, rounds=9)

    async def story():
        async with world.loop() as loop:
            loop.tick()
            slow, quick = sorted(loop.open)
            for _ in range(2):
                assert (await world.deliver(loop, quick, 1)).accepted
                loop.tick()
                quick = next(site for site in loop.open if site != slow)
            with world.store() as store:
                told = operations.status(store, "p")["at_work"]
            assert told == sorted(loop.open) and slow in told
            assert not (await world.deliver(loop, slow, np.nan)).accepted
            loop.tick()
            assert (await world.deliver(loop, quick, 1)).accepted

    asyncio.run(story())
    assert [line["round"] for line in world.lines("refusals.jsonl")] == [1]
    good = world.contents()
    asyncio.run(restarted(world))
    assert world.contents() == good
    run = read_run(world.folder)
    assert [record.accepted for record in run.history] == [1, 1, 1]


async def restarted(world):
    async with world.loop():
        pass


def test_who_owes_an_answer_is_at_work(tmp_path):
    world = World(tmp_path, minimum=1)

    async def story():
        async with world.loop() as loop:
            with world.store() as store:
                loop.tick()
                await world.deliver(loop, "a", 1)
                assert operations.status(store, "p")["at_work"] == sorted(loop.open) == ["b", "c"]
                loop.give_up("b", loop.open["b"]["id"], "gone")
                assert operations.status(store, "p")["at_work"] == sorted(loop.open) == ["c"]

    asyncio.run(story())


def test_an_accepted_update_may_owe_another_answer(tmp_path):
    """By the coordinator alone: the second question of a round goes to two who have delivered."""
    machine = Coordinator(schedules.Synchronous(rounds=1), Key(0))
    ids = {each.client: each.id for each in machine.open(Roster("abc", np.ones(3, np.int64)), 0.0)}
    for name, id in ids.items():
        assert machine.deliver(id, name, 1.0).accepted
    machine.worked()
    with World(tmp_path).store() as store:

        def at_work():
            with store.change(leading=False) as change:
                change.set("coordinator", machine.state())
            return operations.status(store, "p")["at_work"]

        assert at_work() == []
        machine.ask(1, [ids["a"], ids["b"]], 2.0)
        assert at_work() == ["a", "b"]
        machine.deliver(ids["b"], "b", 3.0, step=1)
        assert at_work() == ["a"]
        machine.lost(ids["a"], 4.0)
        assert at_work() == []


def test_atoll_rounds_counts_the_updates(tmp_path, capsys):
    world = World(tmp_path, minimum=2)

    async def story():
        async with world.loop() as loop:
            await troubled(world, loop)

    asyncio.run(story())
    state = StateFolder.make(tmp_path / "state", "p", ["::1"])
    state.use_database(f"sqlite:///{tmp_path / 'x.db'}")
    assert main(["rounds", str(state.path)]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[1:3] == [["1", "closed", "3"], ["2", "closed", "2"]]
    assert rows[0][:2] == ["1", "abandoned"]
