"""Ray: the same bytes on actors as in one process, also when actors are lost."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ray = pytest.importorskip("ray")

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.algorithms import FedAvg, LocalRule
from atoll.backends.ray import _Actors, _fitting
from atoll.errors import ConfigurationError, RunError
from atoll.learners import TorchLearner
from atoll.simulation import RayCluster, Sequential, Stacked

# Ray leaves sockets and subprocesses to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        "local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def clients():
    return population()


def population():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400)
    x = (rng.normal(size=(400, 6)) + y[:, None]).astype(np.float32)
    return data.from_arrays(x, y, classes=3).lognormal(clients=20, sigma=0.8, seed=0)


def federation(algorithm=None, rounds=3):
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    return Federation(
        learner=TorchLearner(module, lr=0.1, batch_size=5, epochs=2),
        algorithm=algorithm or algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=rounds, cohort=11),
    )


LOCAL = Stacked(block=3, workers=1, threads=1)
REMOTE = RayCluster(method=Stacked(block=3), actors=2)


@pytest.mark.slow
def test_two_actors_make_the_bytes_of_one_process(cluster, clients):
    runs = [federation().simulate(clients, seed=3, engine=engine) for engine in (LOCAL, REMOTE)]
    assert runs[0].model["params"].tobytes() == runs[1].model["params"].tobytes()
    assert runs[0].history == runs[1].history
    assert runs[1].engine == "stacked(block=3, workers=1, threads=1)"


class Hunter(threading.Thread):
    """Kills actors' processes with SIGKILL while they are at work."""

    def __init__(self, kills):
        super().__init__()
        self.left, self.killed, self.over = kills, [], threading.Event()

    def run(self):
        import psutil

        while self.left and not self.over.is_set():
            time.sleep(0.25)
            for process in psutil.process_iter(["pid", "cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if "ray::_Worker.run" in line and process.info["pid"] not in self.killed:
                    os.kill(process.info["pid"], signal.SIGKILL)
                    self.killed.append(process.info["pid"])
                    self.left -= 1
                    break


@dataclass(frozen=True, kw_only=True)
class Slow(FedAvg):
    def work(self, client, got, mine):
        time.sleep(0.05)
        return super().work(client, got, mine)


@pytest.mark.slow
def test_actors_that_are_killed_change_no_byte(cluster, clients):
    plan = federation(Slow(), rounds=6)
    quiet = plan.simulate(clients, seed=3, engine=LOCAL)
    hunter = Hunter(3)
    hunter.start()
    try:
        noisy = plan.simulate(clients, seed=3, engine=REMOTE)
    finally:
        hunter.over.set()
        hunter.join()
    assert len(hunter.killed) == 3
    assert noisy.model["params"].tobytes() == quiet.model["params"].tobytes()


class Stern(LocalRule):
    def finish(self, client, local, got, mine):
        raise RunError("not today")


def test_an_error_in_an_actor_is_the_runs_error(cluster, clients):
    engine = RayCluster(method=Sequential(), actors=2)
    with pytest.raises(RunError, match="not today"):
        federation(FedAvg(local=Stern())).simulate(clients, engine=engine)


def test_more_actors_than_there_is_room_for_are_refused(cluster, clients):
    with pytest.raises(ConfigurationError, match="room for 2 actors of 1 cores"):
        federation().simulate(clients, engine=RayCluster(method=Sequential(), actors=5))
    with pytest.raises(ConfigurationError, match="room for 1 actors of 1 cores and 0.6 GPUs"):
        federation().simulate(clients, engine=RayCluster(actors=2, gpus=0.6))


@pytest.mark.parametrize(
    ("node", "cores", "gpus", "actors"),
    [
        ({"CPU": 8.0}, 3, 0.0, 2),
        ({"CPU": 20.0, "GPU": 1.0}, 1, 0.1, 10),
        ({"CPU": 20.0, "GPU": 1.0}, 1, 1 / 3, 3),
        ({"CPU": 20.0, "GPU": 2.0}, 1, 0.4, 4),  # no part lies on two GPUs
        ({"CPU": 20.0, "GPU": 4.0}, 1, 2.0, 2),
        ({"CPU": 2.0, "GPU": 4.0}, 1, 0.5, 2),
        ({"CPU": 8.0}, 1, 0.5, 0),
    ],
)
def test_the_room_on_a_machine(node, cores, gpus, actors):
    assert _fitting(node, cores, gpus) == actors


def _counted(plain, calls):
    def counted(*given):
        calls.append(given)
        return plain(*given)

    return counted


def test_actors_that_share_a_gpu_make_the_same_bytes(cluster, clients, monkeypatch):
    # Ray has been told of a GPU that is not there; what it hands out are shares.
    expected = federation().simulate(clients, engine=LOCAL)
    hired = []
    monkeypatch.setattr(_Actors, "_start_actor", _counted(_Actors._start_actor, hired))
    engine = RayCluster(method=Stacked(block=3), actors=2, gpus=0.5)
    found = federation().simulate(clients, engine=engine)
    assert len(hired) == 2
    assert found.model["params"].tobytes() == expected.model["params"].tobytes()


@pytest.mark.slow
def test_without_a_cluster_one_is_started_and_stopped():
    code = """
import ray, numpy as np
from atoll import Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.simulation import RayCluster
rng = np.random.default_rng(0)
clients = data.from_arrays(
    rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 2, 60), classes=2
).iid(clients=6)
plan = Federation(
    learner=NumpyLearner(layers=(4, 2)), algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=2),
)
local = plan.simulate(clients).model["params"].tobytes()
assert plan.simulate(clients, engine=RayCluster(actors=2)).model["params"].tobytes() == local
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_an_existing_cluster_is_joined_by_its_address():
    """A head node in processes of its own, as on a cluster."""
    # Clusters ask for a token, which head and driver get in the same way.
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}
    # A short path: sockets lie in it. In the usual one this cluster would stay the one to join.
    folder = tempfile.mkdtemp(prefix="ray")
    # Not `ray stop`: it would end this process's own cluster too, and this process with it.
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=6399", "--block",
         "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats",
         f"--temp-dir={folder}"],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert any("Ray runtime started" in line for line in head.stdout), "no head node"
        threading.Thread(target=head.stdout.read, daemon=True).start()
        test = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import ray
from test_ray import LOCAL, RayCluster, Stacked, federation, population
held = population()
engine = RayCluster(method=Stacked(block=3), actors=2, address="127.0.0.1:6399")
runs = [federation().simulate(held, seed=3, engine=each) for each in (LOCAL, engine)]
assert runs[0].model["params"].tobytes() == runs[1].model["params"].tobytes()
"""
        # In a process of its own: this one is the driver of another cluster.
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", test], check=True, timeout=180, env=environment
        )
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
