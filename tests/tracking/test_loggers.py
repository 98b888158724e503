"""Loggers: what other people's tools were told, and what they kept of it."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from atoll.errors import MissingPackage
from atoll.tracking import Observer, loggers


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


class RecordingWandb:
    """What the logger uses of the package wandb, and a list of the calls."""

    def __init__(self):
        self.calls = []

    def init(self, **given):
        self.calls.append(("init", given))
        return SimpleNamespace(
            log=lambda values, step: self.calls.append(("log", step, values)),
            finish=lambda: self.calls.append(("finish",)),
        )


@pytest.fixture
def wandb(monkeypatch):
    recording = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", recording)
    return recording


def test_wandb_is_told_each_round_once_and_then_the_end(blobs, federation, wandb):
    logger = loggers.WeightsAndBiases("sea", dir="here")
    run = federation.simulate(blobs, observers=[logger])
    begin, *rounds, end = wandb.calls
    given = {"project": "sea", "mode": "offline", "dir": "here", "config": run.config}
    assert begin == ("init", given)
    assert [call[:2] for call in rounds] == [("log", number) for number in range(1, 7)]
    for (_, _, values), record in zip(rounds, run.history, strict=True):
        assert record.metrics.items() <= values.items()
        assert values["participants/accepted"] == 4
    assert rounds[-1][2]["communication/bytes_up"] == run.bytes_up
    assert end == ("finish",)


def test_wandb_is_told_the_end_of_a_run_that_failed_too(blobs, federation, wandb):
    class Broken(Observer):
        def round(self, run, end):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        federation.simulate(blobs, observers=[loggers.WeightsAndBiases(), Broken()])
    assert [call[0] for call in wandb.calls] == ["init", "log", "finish"]


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


OFFLINE = """
    import sys
    import numpy as np, psutil, wandb
    from atoll import Federation, algorithms, data, schedules
    from atoll.learners import NumpyLearner
    from atoll.tracking import loggers

    x = np.random.default_rng(0).normal(size=(60, 2))
    clients = data.from_arrays(x, (x[:, 0] > 0).astype(int), classes=2).iid(clients=3)
    run = Federation(
        learner=NumpyLearner(layers=(2, 2)), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=6),
    ).simulate(clients, observers=[loggers.WeightsAndBiases(dir=sys.argv[1])])
    helpers = psutil.Process().children(recursive=True)
    wandb.teardown()
    gone, left = psutil.wait_procs(helpers, timeout=120)
    assert not left, left
    print("accuracies", *run.series("accuracy")[1])
"""


def test_wandb_offline(tmp_path):
    """In a process of its own; the file is read when that and all that it started have ended."""
    pytest.importorskip("wandb")
    pytest.importorskip("psutil")
    from wandb.proto import wandb_internal_pb2

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OFFLINE), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("accuracies")]
    expected = [float(word) for word in line.split()[1:]]
    (path,) = tmp_path.rglob("*.wandb")
    logged = []
    for written in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(written)
        for item in (*record.history.item, *record.request.partial_history.item):
            if (item.key or "/".join(item.nested_key)) == "accuracy":
                logged.append(float(item.value_json))
    assert len(expected) == 6
    assert logged == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logger", "package"),
    [(loggers.MLflow, "mlflow"), (loggers.WeightsAndBiases, "wandb")],
)
def test_missing_loggers_say_what_to_install(logger, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=f"pip install '{package}'"):
        logger()
