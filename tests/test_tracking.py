import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from atoll import Evaluation, algorithms, schedules
from atoll.core import files
from atoll.errors import CheckpointError, ConfigurationError, MissingPackage
from atoll.learners import NumpyLearner, rates
from atoll.rounds.describe import describe
from atoll.simulation import RandomDevices
from atoll.tracking import Observer, RunFolder, find_runs, loggers, read_run
from atoll.tracking.folder import new_folder
from atoll.tracking.progress import LiveProgress, PlainProgress
from atoll.tracking.reading import read_status


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
    np.testing.assert_array_equal(theirs["params"], run.model["params"])
    names = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert names == ["00000004.safetensors", "00000006.safetensors", "best.safetensors"]
    ledger = [
        json.loads(line) for line in (tmp_path / "r" / "ledger.jsonl").read_text().splitlines()
    ]
    assert sum(up for line in ledger for *_, up in line["participants"]) == run.bytes_up
    assert {p.name for p in (tmp_path / "r" / "figures").iterdir()} >= {"accuracy.png", "loss.png"}
    assert read_status(tmp_path / "r") == "finished"
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["plan"]["algorithm"]["kind"] == "atoll.algorithms.scaffold.Scaffold"
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


def test_the_best_model_is_the_best_rounds(blobs, federation, tmp_path):
    models = []

    class Keep(Observer):
        def round(self, run, end):
            models.append(run.model["params"].copy())

    run = federation.simulate(
        blobs, folder=RunFolder(tmp_path / "r", best="loss"), observers=[Keep()]
    )
    about, vectors = files.load(tmp_path / "r" / "checkpoints" / "best.safetensors", "model")
    losses = run.series("loss")[1]
    assert about["round"] == losses.index(min(losses)) + 1
    np.testing.assert_array_equal(vectors["params"], models[about["round"] - 1])


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


def test_descriptions_are_plain_and_stable(federation):
    from functools import partial

    plain = describe(
        {
            "rate": rates.Cosine(0.1, 10),
            "function": np.mean,
            "partial": partial(sorted, key=len),
            "array": np.arange(3),
            "set": {"b", "a"},
            "object": object(),
            "float": np.float64(2.5),
        }
    )
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rate"] == {
        "kind": "atoll.learners.rates.Cosine", "initial": 0.1, "rounds": 10, "final": 0.0,
    }  # fmt: skip
    assert plain["set"] == ["a", "b"]
    assert "0x" not in str(plain)
    assert federation.describe()["learner"]["layout"]["params"] == 9


def test_plain_progress(blobs, federation):
    stream = io.StringIO()
    federation.simulate(blobs, observers=[PlainProgress(stream)])
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("round 1/6  loss ")
    assert "accuracy" in lines[0]
    assert "left" in lines[0]
    assert "round 6/6" in lines[-1]
    assert "done in" in lines[-1]


def test_live_progress(blobs, federation):
    pytest.importorskip("rich")
    stream = io.StringIO()
    federation.simulate(blobs, observers=[LiveProgress(stream)])
    assert "6/6" in stream.getvalue()


def test_plots(blobs, federation, tmp_path):
    pytest.importorskip("matplotlib")
    run = replace(federation, evaluation=Evaluation(clients_every=2)).simulate(
        blobs, devices=RandomDevices()
    )
    for against in ("round", "bytes", "seconds"):
        path = run.plot(tmp_path / f"{against}.png", against=against)
        assert path.read_bytes().startswith(b"\x89PNG")
    run.plot(tmp_path / "loss.svg", "train_loss")
    run.plot_spread(tmp_path / "spread.png")
    assert set(run.per_client["accuracy"]) <= set(blobs.names)
    with pytest.raises(
        ConfigurationError, match="'auc' was not evaluated per client; accuracy was"
    ):
        run.plot_spread(tmp_path / "x.png", "auc")
    with pytest.raises(ConfigurationError, match="no metric 'f7'; it has accuracy"):
        run.plot(tmp_path / "x.png", "f7")
    with pytest.raises(ConfigurationError, match="not 'time'"):
        run.plot(tmp_path / "x.png", against="time")
    assert not (tmp_path / "x.png").exists()


def test_run_summaries(blobs, federation):
    run = federation.simulate(blobs)
    assert str(run).startswith("6 of 6 rounds on blobs: loss ")
    assert run.rounds_to("accuracy", 0.0) == 1
    assert run.rounds_to("accuracy", 1.1) is None


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_logged(blobs, federation, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = federation.simulate(blobs, observers=[loggers.TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = events.Scalars("accuracy")
    assert [event.step for event in logged] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in logged] == pytest.approx(run.series("accuracy")[1])
    assert "communication/bytes_up" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_what_was_logged(blobs, federation, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = federation.simulate(blobs, observers=[loggers.MLflow("test", uri)])
    (kept,) = mlflow.search_runs(experiment_names=["test"], output_format="list")
    assert kept.data.metrics["accuracy"] == pytest.approx(run.metrics["accuracy"])
    assert kept.data.params["schedule.rounds"] == "6"


def wandb_records(whole):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 kB after seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(whole):
        left = 32768 - at % 32768
        if left < 7:
            at += left  # what is left of a block is too short for a header
            continue
        length, kind = int.from_bytes(whole[at + 4 : at + 6], "little"), whole[at + 6]
        parts += whole[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(blobs, federation, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    run = federation.simulate(blobs, observers=[loggers.WeightsAndBiases(dir=str(tmp_path))])
    (path,) = tmp_path.rglob("*.wandb")
    logged = []
    for written in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(written)
        for item in (*record.history.item, *record.request.partial_history.item):
            if (item.key or "/".join(item.nested_key)) == "accuracy":
                logged.append(float(item.value_json))
    assert logged == pytest.approx(run.series("accuracy")[1])


@pytest.mark.parametrize(
    ("logger", "package"),
    [(loggers.MLflow, "mlflow"), (loggers.WeightsAndBiases, "wandb")],
)
def test_missing_loggers_say_what_to_install(logger, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=f"pip install '{package}'"):
        logger()
