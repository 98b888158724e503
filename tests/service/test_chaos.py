"""Machines are killed at random instants; nothing is lost, nothing is counted twice."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from test_federation import model_of, simulated

from atoll.service.storage.database import engine_for
from atoll.service.storage.tables import assignments, rounds, versions

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

ROUNDS, KILLS = 40, 20


def check(place, url):
    """Every accepted update is in exactly one round, every round has all eight."""
    engine = engine_for(url)
    with engine.connect() as connection:
        accepted = connection.execute(
            sa.select(assignments.c.site, assignments.c.counted).where(
                assignments.c.state == "accepted"
            )
        ).all()
        closed = connection.execute(
            sa.select(rounds.c.round).where(rounds.c.state == "closed")
        ).all()
        made = connection.execute(sa.select(versions.c.version)).scalars().all()
    engine.dispose()
    assert len(accepted) == len(set(accepted)) == 8 * ROUNDS
    assert sorted(row.round for row in closed) == list(range(1, ROUNDS + 1))
    assert sorted(made) == list(range(ROUNDS + 1))


def torment(place, kills: int) -> int:
    """Kill the server `kills` times at random instants, and sites now and then; how often."""
    rng, done = random.Random(7), 0
    names = [str(n) for n in range(8)]
    while done < kills:
        time.sleep(rng.uniform(0.3, 2.5))
        if place.processes["server"].poll() is not None:
            break
        place.kill("server")
        done += 1
        for name in rng.sample(names, rng.choice([0, 1, 2])):
            if place.processes[name].poll() is None:
                place.kill(name)
                place.join(name)
        time.sleep(rng.uniform(0.0, 0.5))
        place.serve()
    return done


def run_through(place, url):
    place.write("Scaffold(option='I')", f"Synchronous(rounds={ROUNDS})", "Mean()")
    tokens = {str(n): place.invite(str(n)) for n in range(8)}
    place.serve("--seed", "5", "--linger", "120", "--set", "schedule.pause=1.0")
    for name, token in tokens.items():
        place.join(name, token)
    place.until(lambda: "joined" in place.log("7"), what="the last site's joining")
    assert torment(place, KILLS) == KILLS, "the run ended before it was tormented enough"
    for name in tokens:
        assert place.wait(name, 240) == 0, place.log(name)[-3000:]
    assert place.wait("server", 60) == 0, place.log("server")[-3000:]
    run = simulated(place, seed=5)
    for name in tokens:
        found = model_of(place.root / name / "model.safetensors")
        assert found.tobytes() == run.model["params"].tobytes()
    check(place, url)
    assert "holds" in place.cli("audit", "verify", "state")


def test_killed_twenty_times_on_sqlite(place):
    run_through(place, f"sqlite:///{place.state / 'atoll.db'}")
    with sqlite3.connect(place.state / "atoll.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_killed_twenty_times_on_postgresql(place, postgres):
    place.database = postgres
    (place.state / "database.url").write_text(postgres)
    run_through(place, postgres)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A PostgreSQL server of its own, from Debian's package; its URL."""
    with postgresql(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@contextmanager
def postgresql(folder: Path):
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = str(found[-1]) if found else shutil.which("initdb")
    if path is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    home = Path(path).resolve().parent
    # It refuses to run as root.
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    user = user if os.geteuid() == 0 else []
    made = subprocess.check_output([*user, "mktemp", "-d", "/tmp/atoll-pg-XXXX"], text=True)
    work = Path(made.strip())
    run = {"check": True, "stdout": subprocess.DEVNULL, "cwd": work}
    make = [*user, home / "initdb", "-D", work / "data", "-U", "atoll", "--auth=trust"]
    subprocess.run(make, **run)
    port = place_port()
    options = f"-p {port} -k {work} -c listen_addresses=127.0.0.1"
    control = [*user, home / "pg_ctl", "-D", work / "data", "-w"]
    subprocess.run([*control, "-o", options, "-l", work / "log", "start"], **run)
    try:
        yield f"postgresql://atoll@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **run)
        subprocess.run([*user, "rm", "-rf", work], check=True)


def place_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
