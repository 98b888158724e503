"""Real processes in rounds of several questions: killed at random, given up, and taken up again."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from test_federation import model_of, simulated

from atoll.service.storage.database import engine_for
from atoll.service.storage.tables import answers, assignments, rounds

pytest.importorskip("sklearn")

FEDERATION = """
from pathlib import Path

from masks import Asking, Masked

import atoll
from atoll import Federation, schedules


class Shut(Asking):
    '''Cannot be closed until there is a file beside it.'''

    def talk(self, schema, talk):
        found = yield from super().talk(schema, talk)
        if not Path("open").exists():
            raise ValueError("the door is shut")
        return found


federation = Federation(
    learner=atoll.learners.NumpyLearner(layers=(64, 10), lr=0.1, batch_size=16),
    algorithm=atoll.algorithms.FedAvg(weighting="uniform"),
    schedule=schedules.Synchronous({schedule}),
    pipeline={pipeline},
)


def clients():
    return atoll.data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0).subset([0, 1, 2])
"""
NAMES = ("0", "1", "2")


def write(place, pipeline, schedule):
    shutil.copy(Path(__file__).parent / "masks.py", place.root)
    text = FEDERATION.format(pipeline=pipeline, schedule=schedule)
    (place.root / "federation.py").write_text(text)


def torment(place, kills, seed):
    """Kill the server and its sites at random instants; how often it was done."""
    rng, done = random.Random(seed), 0
    while done < kills:
        time.sleep(rng.uniform(0.2, 1.5))
        if place.processes["server"].poll() is not None:
            break
        victim = rng.choice(["server", "server", *NAMES])
        if place.processes[victim].poll() is not None:
            break
        place.kill(victim)
        done += 1
        time.sleep(rng.uniform(0.0, 0.3))
        if victim == "server":
            place.serve()
        else:
            place.join(victim)
    return done


@pytest.mark.slow
def test_killed_thirty_times_between_keys_and_masks(place):
    count = 25
    write(place, "Masked()", f"rounds={count}, pause=1.0")
    tokens = {name: place.invite(name) for name in NAMES}
    place.serve("--seed", "6", "--linger", "120")
    for name, token in tokens.items():
        place.join(name, token)
    place.until(lambda: all("joined" in place.log(name) for name in NAMES), what="joining")
    assert torment(place, 30, seed=11) == 30, "the run ended before it was tormented enough"
    for name in NAMES:
        assert place.wait(name, 300) == 0, place.log(name)[-3000:]
    assert place.wait("server", 60) == 0, place.log("server")[-3000:]
    run = simulated(place, seed=6)
    for name in NAMES:
        found = model_of(place.root / name / "model.safetensors")
        assert found.tobytes() == run.model["params"].tobytes()
        assert not [*(place.root / name / "outbox").iterdir()]
    engine = engine_for(f"sqlite:///{place.state / 'atoll.db'}")
    with engine.connect() as connection:
        parts = connection.execute(sa.select(assignments)).mappings().all()
        told = connection.execute(sa.select(answers)).mappings().all()
        attempts = connection.execute(sa.select(rounds.c.round, rounds.c.attempt)).all()
    engine.dispose()
    # Nobody was lost, and everybody answered every question once.
    assert [*attempts] == [(round, 0) for round in range(1, count + 1)]
    assert {part["state"] for part in parts} == {"accepted"}
    assert sorted(part["counted"] for part in parts) == sorted([*range(1, count + 1)] * 3)
    assert len(told) == count * 3 * 4
    assert "holds" in place.cli("audit", "verify", "state")
    assert "Traceback" not in place.log("server")


@pytest.mark.slow
def test_given_up_it_says_why_and_goes_on_with_more_attempts(place):
    write(place, "Shut(questions=1)", "rounds=2, attempts=2, pause=0.1")
    tokens = {name: place.invite(name) for name in NAMES}
    place.serve("--linger", "20")
    for name, token in tokens.items():
        place.join(name, token)
    assert place.wait("server") == 3
    assert "given up" in place.log("server")
    assert "Traceback" not in place.log("server")
    why = "could not be closed: the door is shut"
    shown = place.cli("rounds", "state").splitlines()
    assert [line.split()[1] for line in shown if why in line] == ["abandoned"] * 2, shown
    log = place.cli("audit", "show", "state")
    assert sum("round abandoned" in line and why in line for line in log.splitlines()) == 2
    assert why in (place.state / "run" / "refusals.jsonl").read_text()
    for name in NAMES:
        assert place.wait(name) == 3
        assert "given up" in place.log(name)
    # In vain once more, and then the door is open.
    place.serve("--linger", "2")
    assert place.wait("server") == 3
    (place.root / "open").touch()
    place.serve("--linger", "20", "--set", "schedule.attempts=5")
    for name in NAMES:
        place.join(name)
    for name in NAMES:
        assert place.wait(name) == 0, place.log(name)
    assert place.wait("server") == 0, place.log("server")
    states = [line.split()[1] for line in place.cli("rounds", "state").splitlines()[1:]]
    assert states == ["abandoned", "abandoned", "closed", "closed"], states
