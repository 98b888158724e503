"""The command line as a person meets it: what it prints, what it refuses, how it exits."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from atoll.cli import main

FILE = """
from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.learners import NumpyLearner
import numpy as np

rng = np.random.default_rng(0)
y = rng.integers(0, 3, 240)
x = rng.normal(size=(240, 2)) + 3 * np.stack([np.cos(2.1 * y), np.sin(2.1 * y)], axis=1)
clients = data.from_arrays(x, y, classes=3, name="blobs").dirichlet(clients=8, alpha=0.5)
federation = Federation(
    learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
    algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=6, cohort=4),
    pipeline=Clip(5.0) >> Mean(),
)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs.py").write_text(FILE)
    return tmp_path


@pytest.fixture
def atoll(here, capsys):
    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_simulate_keeps_a_run_and_shows_it(atoll, here):
    code, out, err = atoll("simulate", "blobs.py", "--baselines")
    assert code == 0
    assert "run folder: runs/blobs-1" in out
    assert re.search(r"accuracy +0\.9", out)
    assert "each client alone" in out
    assert "round 6/6" in err
    code, out, _ = atoll("simulate", "blobs.py", "--seed", "4", "--name", "four")
    assert code == 0
    assert (here / "runs" / "four" / "model.safetensors").exists()

    code, out, _ = atoll("runs")
    assert code == 0
    assert re.search(r"blobs-1 +finished +blobs +FedAvg +6/6 +0\.\d{4} accuracy", out)

    code, out, _ = atoll("show", "blobs-1", "--plot", "picture.png", "--against", "bytes")
    assert code == 0
    assert "Clip(norm=5.0) >> Mean()" in out
    assert (here / "picture.png").stat().st_size > 5000
    code, out, _ = atoll("show", "runs/blobs-1", "--json")
    assert out.count('"round"') == 6

    code, out, _ = atoll("compare", "blobs-1", "four")
    assert code == 0
    assert re.search(r"seed +0 +4", out)
    assert (here / "runs" / "compare.png").exists()


def test_settings_change_the_federation(atoll, here):
    code, _, _ = atoll(
        "simulate", "blobs.py",
        "--set", "schedule.rounds=2", "--set", "learner.lr=0.5",
        "--set", "pipeline.0.norm=0.25", "--set", "algorithm.weighting=uniform",
    )  # fmt: skip
    assert code == 0
    text = (here / "runs" / "blobs-1" / "config.json").read_text()
    for expected in ('"rounds": 2', '"lr": 0.5', '"norm": 0.25', '"weighting": "uniform"'):
        assert expected in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.round=3", "Synchronous has no 'round'; did you mean 'rounds'?"),
        ("rounds=3", "Federation has no 'rounds'; it has learner"),
        ("schedule.rounds=many", "'schedule.rounds' is 6, which 'many' cannot replace"),
        ("schedule.rounds=0", "rounds must be a whole number of at least 1"),
        ("schedule.cohort=100", "cohort=100 is larger than the population of 8 clients"),
        ("schedule=3", "set one of its fields, e.g. schedule.rounds="),
        ("schedule.rounds", "--set needs NAME=VALUE"),
        ("schedule.adaptive=no", "is True or False, not 'no'"),
        ("schedule.selection=Poisson", "is a Uniform, which is made in the file"),
        ("pipeline=3", "set one of its fields, e.g. pipeline.0="),
        ("pipeline.1.norm=3", "Mean has no 'norm'; it has heaviest"),
        ("schedule.selection.norm=3", "Uniform has no 'norm', nor any other setting"),
        ("pipeline.7.norm=1", "the pipeline has stages 0 to 1"),
        ("algorithm.weighting=size", "weighting must be examples, uniform or work"),
        ("learner.layers.0=4", "tuple has no settings"),
    ],
)
def test_bad_settings_get_a_sentence(atoll, here, setting, message):
    code, _, err = atoll("simulate", "blobs.py", "--set", setting)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not (here / "runs" / "blobs-1").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not define `federation`; it must have federation = Federation(...)"),
        ("federation = 1\nclients = 2", "`federation` in bad.py is not a Federation but 1"),
        (FILE + "\nclients = 3", "`clients` in bad.py is a int, not FederatedData"),
        ("x = 1\nraise RuntimeError('my fault')", "raised RuntimeError at line 2: my fault"),
        ("def f(:", "raised SyntaxError at line 1"),
        ("import sys; sys.exit(3)", "ended by sys.exit(3)"),
        ("def federation(): raise KeyError('x')\nclients = 1", "raised KeyError at line 1"),
        (FILE + "\ndevices = 7", "`devices` in bad.py are not Devices but 7"),
        ("import nothing_like_it", "raised ModuleNotFoundError at line 1"),
        ("from atoll import data\ndata.load('digitz')", "did you mean 'digits'"),
        (FILE + "\nx[0] = np.nan\ndata.from_arrays(x, y)", "NaN or infinity"),
    ],
)
def test_bad_files_get_a_sentence(atoll, here, text, message):
    (here / "bad.py").write_text(text)
    code, _, err = atoll("simulate", "bad.py")
    assert code == 1
    assert message.lower() in err.lower()
    assert err.startswith("atoll: ")
    assert "Traceback" not in err


def test_commands_that_make_no_sense(atoll):
    assert atoll("simulate")[0] == 2
    assert atoll("fly")[0] == 2
    assert atoll()[0] == 2
    assert atoll("simulate", "blobs.py", "--checkpoint-every", "0")[0] == 2


def test_things_that_are_not_there(atoll, here):
    assert atoll("simulate", "none.py") == (1, "", "atoll: there is no file none.py\n")
    code, _, err = atoll("show", "none")
    assert (code, "there is no run 'none'" in err) == (1, True)
    assert atoll("simulate", "blobs.py", "--resume", "none")[0] == 1
    assert atoll("data", "digitz")[0] == 1
    code, out, _ = atoll("runs")
    assert (code, "no runs in runs" in out) == (0, True)


def test_devices_of_the_file_are_used(atoll, here):
    text = FILE + "\nfrom atoll.simulation import RandomDevices\ndevices = RandomDevices()\n"
    (here / "timed.py").write_text(text)
    code, out, _ = atoll("simulate", "timed.py")
    assert code == 0
    assert "simulated time" in out


def test_runs_of_one_name_in_two_places_are_compared(atoll, here):
    atoll("simulate", "blobs.py", "--runs", "a", "--name", "x")
    atoll("simulate", "blobs.py", "--runs", "b", "--name", "x", "--seed", "1")
    code, out, _ = atoll("compare", "a/x", "b/x")
    assert code == 0
    assert "a/x" in out
    assert "b/x" in out


def test_names_are_shown_as_they_are(here):
    text = FILE.replace('name="blobs"', 'name="Spit\u00e4ler [bold] [/final]"')
    (here / "named.py").write_text(text, encoding="utf-8")
    for command in (["simulate", "named.py"], ["runs"]):
        done = subprocess.run(
            [sys.executable, "-m", "atoll", *command],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0, done.stderr
        assert "[bold] [/final]" in done.stdout


def test_functions_may_stand_for_values(atoll, here):
    text = FILE.replace("clients = ", "def clients():\n    return ")
    (here / "late.py").write_text(text)
    assert atoll("simulate", "late.py", "--set", "schedule.rounds=1")[0] == 0


def test_damaged_checkpoints_exit_with_a_sentence(atoll, here):
    atoll("simulate", "blobs.py")
    latest = sorted((here / "runs" / "blobs-1" / "checkpoints").glob("0*"))[-1]
    latest.write_bytes(latest.read_bytes()[:100])
    code, _, err = atoll("simulate", "blobs.py", "--resume", "blobs-1")
    assert code == 1
    assert "damaged or not a checkpoint" in err


def test_a_damaged_run_does_not_hide_the_others(atoll, here):
    atoll("simulate", "blobs.py")
    (here / "runs" / "broken").mkdir()
    (here / "runs" / "broken" / "config.json").write_text("{")
    code, out, _ = atoll("runs")
    assert code == 0
    assert "blobs-1" in out
    assert "damaged" in out


def test_data_lists_and_shows(atoll):
    pytest.importorskip("sklearn")
    code, out, _ = atoll("data")
    assert code == 0
    assert "digits" in out
    assert "heart" in out
    code, out, _ = atoll("data", "digits")
    assert code == 0
    assert "1797" in out


def test_version(atoll):
    code, out, _ = atoll("--version")
    assert code == 0
    assert out.startswith("atoll ")


def test_demo(atoll, here):
    pytest.importorskip("sklearn")
    code, out, _ = atoll("demo")
    assert code == 0
    rows = {
        name: float(re.search(rf"{name} +(0\.\d+)", out).group(1))
        for name in ("each client alone", "federated", "all data in one place")
    }
    assert rows["each client alone"] + 0.2 < rows["federated"] <= rows["all data in one place"]
    assert (here / "runs" / "demo-1" / "figures" / "demo.png").exists()
    assert "run folder: runs/demo-1" in out


def test_ctrl_c_says_how_to_go_on(here):
    slow = FILE + "\nimport time\n_real = NumpyLearner.train\n"
    slow += "def train(*a, **k):\n    time.sleep(0.05)\n    return _real(*a, **k)\n"
    slow += "NumpyLearner.train = train\n"
    (here / "slow.py").write_text(slow)
    command = [sys.executable, "-m", "atoll", "simulate", "slow.py"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    lines = here / "runs" / "slow-1" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    hint = re.search(r"go on with: atoll (simulate slow.py --resume runs/slow-1)", err)
    assert hint
    assert "Traceback" not in err
    done = subprocess.run([*command[:3], *hint.group(1).split()], capture_output=True, text=True)
    assert done.returncode == 0
    assert "resuming after round" in done.stderr
    whole = subprocess.run(command, capture_output=True, text=True)
    assert whole.returncode == 0
    models = [(here / "runs" / f"slow-{n}" / "model.safetensors").read_bytes() for n in (1, 2)]
    assert models[0] == models[1]


def test_output_into_a_closed_pipe_is_quiet(here):
    done = subprocess.run(
        f"{sys.executable} -m atoll data | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("engine", ["sequential(workers=1)", "sequential(processes=2)"])
def test_a_training_that_ends_the_process_is_no_success(tmp_path, monkeypatch, capsys, engine):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends.py").write_text(
        "import atoll, sys\n"
        "from dataclasses import dataclass\n"
        "from atoll import Federation, algorithms, schedules\n"
        "@dataclass(frozen=True, eq=False)\n"
        "class Ends(atoll.learners.NumpyLearner):\n"
        "    def train(self, *given, **named):\n"
        "        sys.exit(0)\n"
        "federation = Federation(\n"
        "    learner=Ends(layers=(64, 10)), algorithm=algorithms.FedAvg(),\n"
        "    schedule=schedules.Synchronous(rounds=2))\n"
        "clients = atoll.data.load('digits').iid(clients=3)\n"
    )
    assert main(["simulate", "ends.py", "--engine", engine]) == 1
    assert "a client's training called sys.exit(0)" in capsys.readouterr().err


def test_figures_that_four_decimals_cannot_tell_have_an_exponent():
    from atoll.cli.tables import figure

    told = {
        2.72e-12: "2.72e-12", -3.2e-07: "-3.2e-07", 4e-05: "4e-05", 1.2e14: "1.2e+14",
        0.0: "0.0000", 0.5: "0.5000", -12.25: "-12.2500", 1e-4: "0.0001",
        float("nan"): "-", float("inf"): "inf",
    }  # fmt: skip
    assert {value: figure(value) for value in told} == told
    assert figure(None) == "-"
