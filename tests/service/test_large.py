"""A served model of 60 MB: what the server's memory peaks at, however many sites there are."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from atoll.cli.files import read_federation
from atoll.core import room
from atoll.core.model_file import load_model

pytest.importorskip("sklearn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not room._able, reason="nothing can be let go here"),
]
FEDERATION = """
import atoll
from atoll import Federation, schedules

federation = Federation(
    learner=atoll.learners.NumpyLearner(layers=(64, {wide}, 10), lr=0.1, steps=2),
    algorithm=atoll.algorithms.{algorithm},
    schedule=schedules.Synchronous(rounds={rounds}, cohort={sites}, minimum={sites}),
)


def clients():
    return atoll.data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0).subset(range({sites}))
"""
WIDE = 200_000
MODEL = 4 * (64 * WIDE + WIDE + 10 * WIDE + 10)


def highest(process) -> int:
    """The kernel's own peak of a process's resident memory, in bytes; 0 once it has ended."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def served(place, sites, wide=WIDE, rounds=2, algorithm="FedAvg()", killed=False) -> int:
    """A whole federation; the server's peak."""
    (place.root / "federation.py").write_text(
        FEDERATION.format(wide=wide, sites=sites, rounds=rounds, algorithm=algorithm)
    )
    tokens = {str(n): place.invite(str(n)) for n in range(sites)}
    server = place.serve("--seed", "3", "--sites", str(sites))
    peaks, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peaks.append(highest(place.processes["server"]))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        place.until(lambda: "leading" in place.log("server"))
        # What the learner took to make the first model is not the rounds'.
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")
        peaks.clear()
        for name, token in tokens.items():
            place.join(name, token)
        if killed:
            place.until(lambda: "round 1 closed" in place.log("server"), 300)
            place.kill("server")
            place.serve()
        for name in tokens:
            assert place.wait(name, 600) == 0, place.log(name)
        server = place.processes["server"]
        assert place.wait("server", 60) == 0, place.log("server")
        assert server.returncode == 0
    finally:
        over.set()
        watching.join()
    return max(peaks)


def moved(place, name):
    """The same place, in a folder of its own."""
    (place.root / name).mkdir()
    here = type(place)(place.root / name)
    here.cli("init", "state", "--host", "127.0.0.1")
    return here


def test_the_servers_peak_is_a_model_and_a_half_for_two_sites_and_for_six(place):
    peaks = {}
    for sites, wide in ((2, 16), (2, WIDE), (6, WIDE)):
        here = moved(place, f"{sites}-{wide}")
        try:
            peaks[sites, wide] = served(here, sites, wide)
        finally:
            here.close()
    bare = peaks[2, 16]
    # Beside the model, a few MB of bodies on their way for every site.
    for sites in (2, 6):
        assert peaks[sites, WIDE] - bare < 1.5 * MODEL + sites * (4 << 20), peaks
    assert peaks[6, WIDE] - peaks[2, WIDE] < 0.5 * MODEL, peaks


@pytest.mark.parametrize("algorithm", ["FedAvg()", "FedAdam()", "Scaffold()"])
def test_served_large_and_killed_between_it_is_the_simulation(place, algorithm):
    served(place, 2, rounds=3, algorithm=algorithm, killed=True)
    federation, clients, _ = read_federation(str(place.root / "federation.py"))
    run = federation.simulate(clients, seed=3, engine="sequential(workers=1)")
    model = load_model(place.root / "0" / "model.safetensors").vectors
    np.testing.assert_array_equal(model["params"], run.model["params"])
    assert list((place.root / "state" / "incoming").iterdir()) == []
