"""Runs round by round: a loop that is left early leaves what can be gone on with."""

import gc
from dataclasses import replace

import numpy as np
import pytest

from atoll import algorithms, schedules
from atoll.tracking.reading import read_status


@pytest.fixture
def plan(federation):
    return replace(federation, algorithm=algorithms.Scaffold())


def test_round_by_round_is_the_same_run(blobs, plan):
    whole = plan.simulate(blobs, seed=2)
    rounds = plan.rounds(blobs, seed=2)
    seen = []
    for record in rounds:
        assert rounds.run.history[-1] is record
        seen.append(record)
    assert seen == whole.history
    assert rounds.run.model["params"].tobytes() == whole.model["params"].tobytes()
    # It is over: there is nothing more to have.
    assert list(rounds) == []


@pytest.mark.parametrize("last", [1, 3, 5])
def test_a_loop_left_early_leaves_a_folder_to_go_on_from(blobs, plan, tmp_path, last):
    whole = plan.simulate(blobs, seed=2, engine="sequential")
    rounds = plan.rounds(blobs, seed=2, engine="sequential", folder=tmp_path / "run")
    for record in rounds:
        if record.round == last:
            break
    gc.collect()
    assert [r.round for r in rounds.run.history] == list(range(1, last + 1))
    assert read_status(tmp_path / "run") == "interrupted"
    rest = plan.simulate(blobs, seed=2, folder=tmp_path / "run", resume=True)
    assert rest.history == whole.history
    assert rest.model["params"].tobytes() == whole.model["params"].tobytes()
    assert read_status(tmp_path / "run") == "finished"


def test_a_loop_that_fails_leaves_one_too(blobs, plan, tmp_path):
    whole = plan.simulate(blobs, engine="sequential")

    def fail_in_round_2():
        for record in plan.rounds(blobs, engine="sequential", folder=tmp_path / "run"):
            1 / (record.round - 2)

    with pytest.raises(ZeroDivisionError):
        fail_in_round_2()
    gc.collect()
    rest = plan.rounds(blobs, folder=tmp_path / "run", resume=True)
    assert [r.round for r in rest] == [3, 4, 5, 6]
    assert rest.run.history == whole.history
    assert rest.run.model["params"].tobytes() == whole.model["params"].tobytes()


def test_an_asynchronous_run_can_be_left_too(blobs, plan, tmp_path):
    schedule = schedules.Buffered(rounds=6, concurrency=4, buffer=2, staleness=schedules.Constant())
    plan = replace(plan, schedule=schedule)
    whole = plan.simulate(blobs, engine="sequential")
    for record in plan.rounds(blobs, engine="sequential", folder=tmp_path / "run"):
        if record.round == 3:
            break
    gc.collect()
    rest = plan.simulate(blobs, folder=tmp_path / "run", resume=True)
    assert rest.model["params"].tobytes() == whole.model["params"].tobytes()


def test_the_model_can_be_looked_at_in_between(blobs, plan):
    rounds, models = plan.rounds(blobs), []
    for record in rounds:
        models.append(rounds.run.model["params"].copy())
        half = replace(plan, schedule=replace(plan.schedule, rounds=record.round))
        assert models[-1].tobytes() == half.simulate(blobs).model["params"].tobytes()
    assert len({m.tobytes() for m in models}) == 6 and np.isfinite(models).all()
