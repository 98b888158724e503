"""Run folders: what they hold, resuming to the same bytes, and damage that is noticed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tapped import Tapped

from atoll import Federation, algorithms, data, schedules, stopping
from atoll.algorithms import ServerOptimizer
from atoll.errors import CheckpointError
from atoll.learners import NumpyLearner
from atoll.simulation import LogNormal, RandomDevices
from atoll.tracking import Observer, RunFolder, find_runs, read_run, reading
from atoll.tracking.best import Best
from atoll.tracking.folder import new_folder
from atoll.tracking.reading import read_status
from atoll.tracking.record import Record


class Stop(Exception):
    pass


class StopAfter(Observer):
    """Ends a run abruptly, as a crash would."""

    def __init__(self, round):
        self.at = round

    def round(self, run, end):
        if end.record.round == self.at:
            raise Stop


ALGORITHMS = [
    algorithms.FedAvg(),
    algorithms.Scaffold(),
    algorithms.FedAvgM(),
    algorithms.FedAdam(),
]


def contents(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "rounds.jsonl", "ledger.jsonl")
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
def test_a_resumed_run_ends_in_the_same_bytes(blobs, federation, tmp_path, algorithm):
    federation = replace(
        federation,
        algorithm=algorithm,
        schedule=schedules.Synchronous(rounds=11, cohort=3, invite=4, minimum=1, attempts=99),
    )
    devices = RandomDevices(dropout=0.2, jitter=0.5)
    whole = federation.simulate(blobs, folder=tmp_path / "whole", devices=devices)
    broken = RunFolder(tmp_path / "broken", every=3)
    for stop in (5, 8):
        with pytest.raises(Stop):
            federation.simulate(
                blobs,
                folder=broken,
                devices=devices,
                observers=[StopAfter(stop)],
                resume=stop > 5,
            )
        broken = RunFolder(tmp_path / "broken", every=3)
    resumed = federation.simulate(blobs, folder=broken, devices=devices, resume=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert resumed.history == whole.history


def test_a_run_that_stopped_before_its_first_checkpoint_begins_anew(blobs, federation, tmp_path):
    with pytest.raises(Stop):
        federation.simulate(blobs, folder=tmp_path / "a", observers=[StopAfter(2)])
    federation.simulate(blobs, folder=tmp_path / "a", resume=True)
    federation.simulate(blobs, folder=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_resuming_a_finished_run_changes_nothing(blobs, federation, tmp_path):
    run = federation.simulate(blobs, folder=tmp_path / "a")
    before = contents(tmp_path / "a") | {"spread": (tmp_path / "a" / "spread.json").read_bytes()}
    again = federation.simulate(blobs, folder=tmp_path / "a", resume=True)
    after = contents(tmp_path / "a") | {"spread": (tmp_path / "a" / "spread.json").read_bytes()}
    assert after == before
    assert again.per_client == run.per_client != {}


def test_a_finished_run_can_be_extended(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=tmp_path / "a")
    longer = replace(federation, schedule=replace(federation.schedule, rounds=9))
    longer.simulate(blobs, folder=tmp_path / "a", resume=True)
    longer.simulate(blobs, folder=tmp_path / "b")
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]


SCRIPT = """
import sys, time
from pathlib import Path
from atoll import Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.tracking import Observer, RunFolder
import numpy as np

class Slow(Observer):
    def round(self, run, end):
        time.sleep(float(sys.argv[2]))

rng = np.random.default_rng(0)
x, y = rng.normal(size=(300, 5)), rng.integers(0, 3, 300)
clients = data.from_arrays(x, y, classes=3).dirichlet(clients=6, alpha=0.5)
folder = Path(sys.argv[1])
Federation(
    learner=NumpyLearner(layers=(5, 8, 3)),
    algorithm=algorithms.Scaffold(),
    schedule=schedules.Synchronous(rounds=30, cohort=3),
).simulate(clients, folder=RunFolder(folder, every=4), resume=folder.exists(), observers=[Slow()])
"""


def start(folder, pause, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause)],
        env={**os.environ, **environment},
        stderr=subprocess.DEVNULL,
    )


def wait_for_rounds(folder, rounds, seconds=60):
    deadline = time.monotonic() + seconds
    path = folder / "rounds.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= rounds:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get going")


def test_kill_and_hash_seeds_do_not_show_in_the_bytes(tmp_path):
    whole = start(tmp_path / "whole", 0, PYTHONHASHSEED="1")
    assert whole.wait(60) == 0
    killed = start(tmp_path / "killed", 0.03, PYTHONHASHSEED="2")
    wait_for_rounds(tmp_path / "killed", 10)
    killed.kill()
    killed.wait()
    assert start(tmp_path / "killed", 0, PYTHONHASHSEED="3").wait(60) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_leaves_a_resumable_run(tmp_path):
    process = start(tmp_path / "run", 0.05)
    wait_for_rounds(tmp_path / "run", 6)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert read_status(tmp_path / "run") == "interrupted"
    rounds = len(read_run(tmp_path / "run").history)
    latest = sorted((tmp_path / "run" / "checkpoints").glob("0*"))[-1]
    assert int(latest.stem) == rounds >= 6
    assert start(tmp_path / "run", 0).wait(60) == 0
    assert start(tmp_path / "whole", 0).wait(60) == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_what_a_folder_holds(blobs, federation, tmp_path):
    federation = replace(federation, algorithm=algorithms.Scaffold())
    run = federation.simulate(blobs, seed=3, folder=RunFolder(tmp_path / "r", every=2, keep=2))
    again = read_run(tmp_path / "r")
    assert again.history == run.history
    assert (again.seed, again.rounds, again.data["name"]) == (3, 6, "blobs")
    assert again.per_client == run.per_client
    np.testing.assert_array_equal(again.model["params"], run.model["params"])
    theirs = safetensors.numpy.load_file(tmp_path / "r" / "model.safetensors")
    layout = federation.learner.layout
    assert theirs.keys() == {entry.name for entry in layout.entries}
    np.testing.assert_array_equal(layout.pack(theirs)["params"], run.model["params"])
    names = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert names == ["00000004.safetensors", "00000006.safetensors"]
    ledger = [
        json.loads(line) for line in (tmp_path / "r" / "ledger.jsonl").read_text().splitlines()
    ]
    assert sum(up for line in ledger for *_, up in line["participants"]) == run.bytes_up
    assert {p.name for p in (tmp_path / "r" / "figures").iterdir()} >= {"accuracy.png", "loss.png"}
    assert read_status(tmp_path / "r") == "finished"
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["plan"]["algorithm"]["kind"] == "atoll.algorithms.fedavg.FedAvg"
    local = config["plan"]["algorithm"]["local"]
    assert local == {"kind": "atoll.algorithms.scaffold.ControlVariates", "option": "II"}
    assert not list(tmp_path.rglob("*.partial"))


def test_only_memories_that_are_needed_stay(blobs, federation, tmp_path):
    federation = replace(
        federation,
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=20, cohort=8),
    )
    federation.simulate(blobs, folder=RunFolder(tmp_path / "r", every=5, keep=2))
    files = sorted(path.name for path in (tmp_path / "r" / "clients").iterdir())
    assert files == [f"{i:08d}-{r:08d}.safetensors" for i in range(8) for r in (15, 20)]


@dataclass(frozen=True)
class Growing(ServerOptimizer):
    """A step of mean change times -2 to the power of the round."""

    def init(self, params):
        return {"factor": np.ones(1, np.float32)}

    def step(self, params, delta, memory):
        return params + memory["factor"] * delta, {"factor": -2 * memory["factor"]}


def test_the_best_model_is_the_best_rounds(blobs, federation, tmp_path):
    models = []

    class Keep(Observer):
        def round(self, run, end):
            models.append(run.model["params"].copy())

    # From the optimum on, ever larger steps at the server lead away from it.
    wild = replace(federation, algorithm=algorithms.FedAvg(server=Growing(1.0)))
    run = wild.simulate(blobs, folder=RunFolder(tmp_path / "r", best="loss"), observers=[Keep()])
    number, model = run.best()
    losses = run.series("loss")[1]
    assert number == losses.index(min(losses)) + 1 < len(losses)
    np.testing.assert_array_equal(model["params"], models[number - 1])
    assert read_run(tmp_path / "r").best()[0] == number
    first = federation.learner.load_into(model, {})
    loaded = run.load_into({}, best=True)
    assert loaded.keys() == first.keys() == run.load_into({}).keys()
    assert all(np.array_equal(loaded[name], first[name]) for name in first)
    assert any(not np.array_equal(loaded[name], run.load_into({})[name]) for name in first)


def test_without_a_folder_there_is_no_best_model(blobs, federation):
    with pytest.raises(CheckpointError, match="folder="):
        federation.simulate(blobs).best()


def prepared(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=RunFolder(tmp_path / "r", every=2))
    return tmp_path / "r", sorted((tmp_path / "r" / "checkpoints").glob("0*"))[-1]


def resume(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=tmp_path / "r", resume=True)


def test_damaged_checkpoints_get_a_sentence(blobs, federation, tmp_path):
    _, latest = prepared(blobs, federation, tmp_path)
    good = latest.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    foreign = safetensors.numpy.save({"w": np.zeros(3, np.float32)})
    for bad, message in [
        (good[: len(good) // 2], "damaged or not a checkpoint"),
        (b"", "damaged or not a checkpoint"),
        (b"PK\x03\x04" + good, "damaged or not a checkpoint"),
        (bytes(flipped), "do not match their digest"),
        (foreign, "not one of atoll's"),
    ]:
        latest.write_bytes(bad)
        with pytest.raises(CheckpointError, match=message):
            resume(blobs, federation, tmp_path)
    latest.write_bytes((tmp_path / "r" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not a checkpoint of"):
        resume(blobs, federation, tmp_path)


def test_foreign_runs_are_refused(blobs, federation, digits, tmp_path):
    folder, _ = prepared(blobs, federation, tmp_path)
    other = replace(federation, learner=NumpyLearner(layers=(2, 3), lr=0.2, batch_size=10))
    with pytest.raises(CheckpointError, match="plan, data or seed differ"):
        other.simulate(blobs, folder=folder, resume=True)
    with pytest.raises(CheckpointError, match="plan, data or seed differ"):
        federation.simulate(blobs, folder=folder, seed=1, resume=True)
    with pytest.raises(CheckpointError, match="already holds a run"):
        federation.simulate(blobs, folder=folder)
    with pytest.raises(CheckpointError, match="not a run folder"):
        federation.simulate(blobs, folder=tmp_path / "none", resume=True)
    with pytest.raises(CheckpointError, match="needs the folder"):
        federation.simulate(blobs, resume=True)


def test_changed_histories_are_noticed(blobs, federation, tmp_path):
    folder, _ = prepared(blobs, federation, tmp_path)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    (folder / "rounds.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(CheckpointError, match="was changed or cut off"):
        resume(blobs, federation, tmp_path)
    (folder / "rounds.jsonl").write_text("{oops\n" + "\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match="damaged at line 1"):
        resume(blobs, federation, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_gets_a_sentence(blobs, federation, tmp_path):
    keeper = RunFolder(tmp_path / "r")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "rounds.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"rounds.jsonl could not be written: No space left"):
        federation.simulate(blobs, folder=keeper)


def test_a_folder_that_cannot_be_made_gets_a_sentence(blobs, federation, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        federation.simulate(blobs, folder=tmp_path / "file" / "run")


def test_names_of_new_folders(tmp_path):
    assert new_folder(tmp_path, "my run!").name == "my-run-1"
    (tmp_path / "my-run-7").mkdir()
    (tmp_path / "my-run-x").mkdir()
    assert new_folder(tmp_path, "my run!").name == "my-run-8"
    assert find_runs(tmp_path / "nothing") == []


def test_run_summaries(blobs, federation):
    run = federation.simulate(blobs)
    assert str(run).startswith("6 of 6 rounds on blobs: loss ")
    assert run.rounds_to("accuracy", 0.0) == 1
    assert run.rounds_to("accuracy", 1.1) is None


def test_stopping_in_the_middle_of_a_round_does_not_show(blobs, federation, tmp_path):
    """The clock of a round that was cut short is forgotten with it."""
    devices = RandomDevices(
        steps_per_second=LogNormal(median=1.0, sigma=1.0), availability=0.9, period=7.0
    )
    federation = replace(federation, schedule=schedules.Synchronous(rounds=8, cohort=4))

    done = []

    def stop(turn):
        done.append(turn)
        if len(done) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.simulate(
            blobs, devices=devices, engine=Tapped(lambda turns: None, stop), folder=tmp_path / "a"
        )
    assert len(read_run(tmp_path / "a").history) == 3
    federation.simulate(blobs, devices=devices, folder=tmp_path / "a", resume=True)
    federation.simulate(blobs, devices=devices, folder=tmp_path / "b")
    for name in ("rounds.jsonl", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_any_error_leaves_a_resumable_run(blobs, federation, tmp_path):
    class Broken(Observer):
        def round(self, run, end):
            if end.record.round == 3:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        federation.simulate(blobs, folder=tmp_path / "a", observers=[Broken()])
    assert read_status(tmp_path / "a") == "interrupted"
    assert (tmp_path / "a" / "checkpoints" / "00000003.safetensors").exists()


def test_records_are_strict_json(tmp_path):
    x = np.zeros((40, 2), np.float32)
    clients = data.from_arrays(x, np.ones(40, np.float32), task="regression").iid(clients=2)
    federation = Federation(
        learner=NumpyLearner(layers=(2, 1), loss="squared"),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
    )
    run = federation.simulate(clients, folder=tmp_path / "r")
    assert np.isnan(run.history[0].metrics["r2"])
    text = (tmp_path / "r" / "rounds.jsonl").read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert np.isnan(read_run(tmp_path / "r").history[0].metrics["r2"])


def test_fewer_rounds_than_a_run_has_are_refused(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=tmp_path / "r")
    shorter = replace(federation, schedule=schedules.Synchronous(rounds=3, cohort=4))
    with pytest.raises(CheckpointError, match="has 6 rounds already"):
        shorter.simulate(blobs, folder=tmp_path / "r", resume=True)
    assert read_run(tmp_path / "r").rounds == 6


def test_the_checkpoint_before_a_damaged_one_can_be_used(blobs, federation, tmp_path):
    federation.simulate(blobs, folder=RunFolder(tmp_path / "r", every=2))
    whole = (tmp_path / "r" / "model.safetensors").read_bytes()
    latest = tmp_path / "r" / "checkpoints" / "00000006.safetensors"
    latest.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"delete it to go on .*00000004.safetensors"):
        federation.simulate(blobs, folder=tmp_path / "r", resume=True)
    latest.unlink()
    federation.simulate(blobs, folder=RunFolder(tmp_path / "r", every=2), resume=True)
    assert (tmp_path / "r" / "model.safetensors").read_bytes() == whole


def test_a_folder_in_use_is_left_alone(blobs, federation, tmp_path):
    class Intruder(Observer):
        def round(self, run, end):
            with pytest.raises(CheckpointError, match="in use by a run that is still going on"):
                federation.simulate(blobs, folder=tmp_path / "r", resume=True)

    federation.simulate(blobs, folder=tmp_path / "r", observers=[Intruder()])
    federation.simulate(blobs, folder=tmp_path / "r", resume=True)


def claim(root):
    return str(new_folder(root, "run"))


def test_new_folders_are_never_shared(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        names = pool.map(claim, [tmp_path] * 20)
    assert len(set(names)) == 20


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{}"),
        ("config.json", '{"plan": {"algorithm": 3}, "data": {}, "seed": 0, "rounds": 1}'),
        ("spread.json", "["),
        ("timings.jsonl", "{}\n{}\n"),
        ("rounds.jsonl", '{"round": 1}\n'),
    ],
)
def test_damaged_files_of_a_run_get_a_sentence(blobs, federation, tmp_path, name, text):
    federation.simulate(blobs, folder=tmp_path / "r")
    (tmp_path / "r" / name).write_text(text)
    with pytest.raises(CheckpointError):
        read_run(tmp_path / "r")


def test_one_keeper_can_keep_two_runs(blobs, federation, tmp_path):
    federation = replace(federation, algorithm=algorithms.Scaffold())
    keeper = RunFolder(tmp_path / "a")
    federation.simulate(blobs, folder=keeper)
    keeper.path = tmp_path / "b"
    federation.simulate(blobs, folder=keeper)
    longer = replace(federation, schedule=schedules.Synchronous(rounds=8, cohort=4))
    longer.simulate(blobs, folder=tmp_path / "b", resume=True)


def test_after_a_resume_the_best_model_is_still_the_best(blobs, federation, tmp_path):
    wild = replace(federation, algorithm=algorithms.FedAvg(server=Growing(1.0)))
    whole = wild.simulate(blobs, folder=RunFolder(tmp_path / "a", every=2, best="loss"))
    for record in wild.rounds(blobs, folder=RunFolder(tmp_path / "b", every=2, best="loss")):
        if record.round == 5:
            break
    wild.simulate(blobs, folder=RunFolder(tmp_path / "b", every=2, best="loss"), resume=True)
    assert whole.best()[0] <= 5 < len(whole.history)
    files = [(tmp_path / name / "best.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_run_that_a_rule_ended_is_kept_to_its_end(blobs, federation, tmp_path):
    plan = replace(
        federation, algorithm=algorithms.Scaffold(), stop=stopping.Target("accuracy", 0.5)
    )
    run = plan.simulate(blobs, folder=RunFolder(tmp_path / "r", every=100))
    assert run.stopped and len(run.history) < run.rounds
    number = len(run.history)
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == [
        f"{number:08d}.safetensors"
    ]
    assert any((tmp_path / "r" / "clients").iterdir())
    again = plan.simulate(blobs, folder=RunFolder(tmp_path / "r", every=100), resume=True)
    assert again.history == run.history and again.stopped == run.stopped


def test_the_best_model_is_chosen_by_one_metric_throughout():
    best = Best(None, {})

    def record(round, **metrics):
        return Record(round, metrics, {}, 1, 1, 1, 0, 0, 0.0)

    assert not best.note(record(1))
    assert best.note(record(2, accuracy=0.5, loss=1.0))
    assert not best.note(record(3, accuracy_client_mean=0.9))
    assert not best.note(record(4, accuracy=0.4))
    assert best.note(record(5, accuracy=0.6)) and best.record.round == 5


def test_a_run_that_was_killed_is_not_running(tmp_path):
    (tmp_path / "status.json").write_text('{"status": "running"}')
    assert read_status(tmp_path) == "cut off"
    with reading.hold(tmp_path):
        assert read_status(tmp_path) == "running"
    assert read_status(tmp_path) == "cut off"
