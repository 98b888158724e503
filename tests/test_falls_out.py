"""What falls out of the contract: each example on every engine, and served, with one result."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atoll.core import files, safetensors
from atoll.errors import RunError
from atoll.federation import invite
from atoll.tracking import Observer
from atoll.tracking.tail import RunTail

pytest.importorskip("torch")
pytest.importorskip("sklearn")

FOLDER = Path(__file__).parents[1] / "examples" / "what_falls_out"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
ENGINES = [
    "sequential(workers=2, threads=1)",
    "stacked(block=3, workers=1, threads=1)",
    "stacked(block=3, workers=2, threads=1)",
]
#: Why an example goes one client at a time where a stack is asked for.
ALONE = {"kmeans": "Points trains one client at a time"}


def load(name: str):
    """A fresh copy of an example, as another process would have it."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Keep(Observer):
    """What became of whom; the server's vectors and clients' states after the last round."""

    def __init__(self):
        self.participants = []

    def round(self, run, end):
        self.participants.append(sorted(end.participants))
        self.vectors = {n: np.array(v) for n, v in end.snapshot.vectors.items()}
        states = end.snapshot.states
        self.states = {
            member: {n: np.array(v) for n, v in states[member][1].items()} for member in states
        }


def simulated(name: str, engine: str):
    module, kept = load(name), Keep()
    run = module.federation.simulate(
        module.clients(), seed=1, engine=engine, observers=[kept],
        attackers=getattr(module, "attackers", None),
    )  # fmt: skip
    return run, kept


def test_the_examples_are_short():
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text()
        lines = [line for line in text.splitlines() if line.strip() and "import" not in line]
        assert len(lines) <= 60, name


@pytest.mark.parametrize("name", NAMES)
def test_every_engine_gives_the_same(name):
    run, alone = simulated(name, "sequential(workers=1, threads=1)")
    assert len(run.history) == 3
    for engine in ENGINES:
        other, kept = simulated(name, engine)
        if "stacked" in engine and name not in ALONE:
            assert other.engine.startswith("stacked"), other.engine_notes
        if name in ALONE and "stacked" in engine:
            assert any(ALONE[name] in note for note in other.engine_notes)
        exact = "stacked" not in engine
        for mine, theirs in [
            (alone.vectors, kept.vectors),
            *((alone.states[member], kept.states[member]) for member in alone.states),
        ]:
            assert mine.keys() == theirs.keys()
            for part, vector in mine.items():
                assert vector.dtype == theirs[part].dtype
                if exact:
                    assert vector.tobytes() == theirs[part].tobytes(), (engine, part)
                else:
                    np.testing.assert_allclose(vector, theirs[part], rtol=1e-4, atol=2e-5)
        assert other.bytes_up == run.bytes_up
        assert other.bytes_down == run.bytes_down


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def served(name: str, root: Path):
    """The example, served to a site for each client, over HTTP; its run."""
    pytest.importorskip("sqlalchemy")
    module, port = load(name), free_port()
    names = module.clients().names
    tokens = [invite(root / "state", site) for site in names]
    copies, found = [load(name) for _ in names], {}

    def server():
        found["run"] = module.federation.serve(
            root / "state", port=port, seed=1, sites=len(names), linger=30
        )

    def site(place):
        federation, data = copies[place].federation, copies[place].clients().subset([place])
        found[place] = federation.join(
            f"https://127.0.0.1:{port}", data, root / names[place], token=tokens[place]
        )

    threads = [threading.Thread(target=server)]
    threads += [threading.Thread(target=site, args=(place,)) for place in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found["run"], names


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("attackers", "central_noise")])
def test_served_it_is_the_simulation(name, tmp_path):
    from atoll.service.storage.folder import StateFolder

    run, kept = simulated(name, "sequential(workers=1, threads=1)")
    here, names = served(name, tmp_path)
    folder = StateFolder.open(tmp_path / "state")
    with closing(folder.store()) as store:
        digest = store.version()["state"]
    blob = folder.path / "blobs" / digest[:2] / digest
    vectors, _ = safetensors.decode(blob.read_bytes())
    assert vectors.keys() == kept.vectors.keys()
    for part, vector in kept.vectors.items():
        assert vector.tobytes() == vectors[part].tobytes(), part
    for member, state in kept.states.items():
        (path,) = (tmp_path / names[member] / "memory").glob("*.safetensors")
        own = files.load(path, "memory")[1]
        assert own.keys() == state.keys()
        for part, vector in state.items():
            assert own[part].tobytes() == vector.tobytes(), part
    assert [record.measurements for record in here.history] == [
        record.measurements for record in run.history
    ]
    closed = RunTail(folder.path / "run").read()
    assert [sorted(each.participants) for each in closed] == kept.participants
    assert (here.bytes_up, here.bytes_down) == (run.bytes_up, run.bytes_down)


@pytest.mark.slow
def test_central_noise_served_is_nobody_elses(tmp_path):
    """What is drawn in secret differs between two servers of one seed, and from the simulation."""
    models = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        run, _ = served("central_noise", tmp_path / place)
        models.append(run.model["params"])
    simulation, _ = simulated("central_noise", "sequential(workers=1, threads=1)")
    models.append(simulation.model["params"])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(models[one] - models[other]).max() > 1e-3


def test_kmeans_is_lloyds():
    """Against Lloyd's iterations on everybody's points in one place."""
    module = load("kmeans")
    _, kept = simulated("kmeans", "sequential(workers=1)")
    clients = module.clients()
    x = clients.all_train().all()[0].reshape(-1, 64).astype(float)
    from atoll.algorithms import Start
    from atoll.core.random import Key

    start = Start(np.zeros(0, np.float32), module.federation.learner, None, Key(1).fold("init"))
    centres = module.federation.algorithm.init(start)["centres"]
    for _ in range(3):
        nearest = ((x[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack(
            [x[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(10)]
        )
    np.testing.assert_allclose(kept.vectors["state/centres"], centres, atol=1e-6)


def test_the_median_is_the_median():
    """The bisection ends within the range over 2^12 of NumPy's median of the three updates."""
    module = load("median")
    clients = module.clients().subset([0, 1, 2])
    plan = module.federation
    one = type(plan)(
        learner=plan.learner, algorithm=plan.algorithm, pipeline=plan.pipeline,
        schedule=type(plan.schedule)(rounds=1),
    )  # fmt: skip
    run = one.simulate(clients, seed=1, engine="sequential(workers=1)")
    from atoll.core.random import Key
    from atoll.rounds.server import Server
    from atoll.rounds.task import ClientTask, Received, first_state, run_task

    plain = type(plan)(learner=plan.learner, algorithm=plan.algorithm, schedule=one.schedule)
    server = Server(plain, Key(1))
    received = Received.of(plain, server.broadcast(0))
    rows = []
    for member, name in enumerate(clients.names):
        state = first_state(plain, received, server.blank)
        task = ClientTask.read([member, name, 1, 1, 1.0, 1.0, 0], Key(1), state)
        rows.append(run_task(plain, received, task, clients.train(member))[0].vectors["delta"])
    expected = server.state["params"] + np.median(np.stack(rows), axis=0)
    width = (np.max(rows) - np.min(rows)) / 2**12
    np.testing.assert_allclose(run.model["params"], expected, atol=width)


def test_a_scalar_costs_four_bytes():
    module = load("fednova")
    schema = module.federation.schema
    assert schema.vectors["steps"].nbytes == 4
    assert schema.vectors["delta"].nbytes == 4 * module.federation.learner.layout.size


def test_private_parts_do_not_travel():
    module = load("fedper")
    plan = module.federation
    assert plan.schema.vectors["delta"].size == 64 * 16 + 16
    run, kept = simulated("fedper", "sequential(workers=1)")
    heads = [state["private/params"] for state in kept.states.values()]
    assert all(head.shape == (16 * 10 + 10,) for head in heads)
    assert len({head.tobytes() for head in heads}) == len(heads)
    assert run.metrics["accuracy_client_mean"] > 0.5
    assert "accuracy" not in run.metrics


def test_small_clients_send_less():
    run, _ = simulated("heterofl", "sequential(workers=1)")
    plan = load("heterofl").federation
    inner, outer = (plan.schema.vectors[name].nbytes for name in ("inner", "outer"))
    sent = 3 * (8 * inner + 4 * outer)
    assert sent < run.bytes_up < sent + 3 * 8 * 700  # headers


def test_only_those_who_trained_are_accepted():
    _, kept = simulated("power_of_choice", "sequential(workers=1)")
    for parts in kept.participants:
        outcomes = sorted(part.outcome for part in parts)
        assert outcomes == ["accepted"] * 3 + ["no longer needed"] * 3


def test_a_reducer_that_forgets_the_statistics_is_told():
    from torch import nn

    module = load("krum")
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    normed = replace(module.federation, learner=replace(module.federation.learner, module=model))
    with pytest.raises(RunError, match="made no mean of the model's"):
        normed.simulate(module.clients(), seed=1, engine="sequential(workers=1)")
