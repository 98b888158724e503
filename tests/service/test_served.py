"""Served over HTTP it is the simulation: models, memories and bytes, with several questions too."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest
from masks import Asking, Masked
from processes import plan_of, population

from atoll import algorithms
from atoll.aggregation import Mean
from atoll.core import files, safetensors
from atoll.federation import invite
from atoll.service.storage import rounds as ledger
from atoll.service.storage.folder import StateFolder
from atoll.tracking import Observer

pytest.importorskip("sklearn")


@dataclass(frozen=True)
class Counting(algorithms.LocalRule):
    """Remembers whole numbers and a matrix, and its updates depend on both."""

    def remember(self, got, shared):
        return {
            "rounds": np.zeros(1, np.int64),
            "moves": np.zeros((2, shared.size), np.float32),
            "first": got["params"].copy(),
        }

    def work(self, client, got, mine):
        local = client.train(got["params"])
        move = local.params - got["params"]
        drag = np.float32(0.125) * mine["moves"][0] - np.float32(0.01) * mine["rounds"]
        kept = {
            "rounds": mine["rounds"] + np.int64(1),
            "moves": np.stack([mine["moves"][1], move]),
            "first": mine["first"],
        }
        return local, {"delta": move + drag.astype(np.float32)}, kept


class Keep(Observer):
    """The server's vectors and the clients' states after the last round."""

    def round(self, run, end):
        self.vectors = {n: np.array(v) for n, v in end.snapshot.vectors.items()}
        states = end.snapshot.states
        self.states = {m: {n: np.array(v) for n, v in states[m][1].items()} for m in states}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def served(make, root):
    """A federation and three sites, each with its own copy of the plan, over HTTP."""
    data, port, found, stop = population(), free_port(), {}, threading.Event()
    tokens = {name: invite(root / "state", name) for name in "012"}

    def server():
        found["run"] = make().serve(
            root / "state", port=port, seed=4, sites=3, linger=30, stop=stop
        )

    def site(name):
        own, url = data.subset([data.index(name)]), f"https://127.0.0.1:{port}"
        found[name] = make().join(url, own, root / name, token=tokens[name], stop=stop)

    threads = [threading.Thread(target=server)]
    threads += [threading.Thread(target=site, args=(name,)) for name in "012"]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive(), found
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return found["run"]


def counting():
    algorithm = algorithms.FedAvg(local=Counting(), weighting="uniform")
    return plan_of(Mean(), algorithm, rounds=5, cohort=2)


def counting_and_asking():
    algorithm = algorithms.FedAvg(local=Counting(), weighting="uniform")
    return plan_of(Asking(questions=2), algorithm, rounds=4, cohort=2)


def scaffold():
    return plan_of(Mean(), algorithms.Scaffold(option="I"), rounds=3)


def masked():
    return plan_of(Masked(), rounds=3)


@pytest.mark.parametrize("make", [counting, counting_and_asking, scaffold, masked])
def test_served_it_is_the_simulation_in_every_byte(tmp_path, make):
    run, kept = served(make, tmp_path), Keep()
    simulated = make().simulate(
        population(), seed=4, engine="sequential(workers=1)", observers=[kept]
    )
    folder = StateFolder.open(tmp_path / "state")
    with closing(folder.store()) as store:
        last = store.version()
        counted = {name: ledger.last_counted(store, name, last["version"]) for name in "012"}
    digest = last["state"]
    data = (folder.path / "blobs" / digest[:2] / digest).read_bytes()
    vectors, _ = safetensors.decode(data)
    same(vectors, kept.vectors)
    assert kept.states.keys() == ({0, 1, 2} if make is not masked else set())
    for member, state in kept.states.items():
        memory = tmp_path / str(member) / "memory" / f"{counted[str(member)]}.safetensors"
        own = files.load(memory, "memory")[1]
        same(own, state)
    for mine, theirs in zip(run.history, simulated.history, strict=True):
        assert mine.measurements == theirs.measurements
        assert mine.bytes_up == theirs.bytes_up
        assert mine.accepted == theirs.accepted
        if make is not masked:  # it tells something beside the model
            assert mine.bytes_down == theirs.bytes_down


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, vector in theirs.items():
        assert mine[name].dtype == vector.dtype and mine[name].shape == vector.shape, name
        assert mine[name].tobytes() == vector.tobytes(), name
