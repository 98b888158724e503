"""`atoll sweep`: what is run, what is not run again, and what the table says."""

from __future__ import annotations

import csv
from statistics import mean, stdev

import pytest

from atoll.cli import main
from atoll.cli.sweep import _alternatives
from atoll.errors import ConfigurationError
from atoll.tracking.reading import read_run

FILE = """
import numpy as np
from atoll import Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner

rng = np.random.default_rng(0)
x = rng.normal(size=(200, 4)).astype("f")
federation = Federation(
    learner=NumpyLearner([4, 2], lr=0.1, batch_size=10),
    algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=3, cohort=2),
)
clients = data.from_arrays(x, (x[:, 0] > 0).astype(int)).iid(clients=4)
choices = {"algorithm": {"fedavg": algorithms.FedAvg(), "scaffold": algorithms.Scaffold()}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.py").write_text(FILE)
    return tmp_path


def test_a_grid_is_one_table_over_seeds(here, capsys):
    grid = ["--grid", "learner.lr=0.01,0.5", "--grid", "algorithm=fedavg,scaffold"]
    words = ["sweep", "plan.py", *grid, "--seeds", "2", "--csv", "t.csv", "--latex", "t.tex"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "8 of 8" in shown and "(is there)" not in shown
    heads, *rows = list(csv.reader((here / "t.csv").read_text(encoding="utf-8").splitlines()))
    assert heads == [
        "learner.lr", "algorithm", "accuracy (mean of 2 seeds)", "best accuracy", "rounds"
    ]  # fmt: skip
    assert len(rows) == 4
    last = []
    for lr, algorithm, told, _, rounds in rows:
        folder = here / "runs" / "plan-sweep"
        runs = [read_run(folder / f"lr={lr}_algorithm={algorithm}-seed-{s}") for s in (0, 1)]
        assert {run.seed for run in runs} == {0, 1}
        for run in runs:
            assert run.config["learner"]["lr"] == float(lr)
            assert ("scaffold" in str(run.config["algorithm"]).lower()) == (algorithm == "scaffold")
        values = [run.metrics["accuracy"] for run in runs]
        assert told == f"{mean(values):.4f} ± {stdev(values):.4f}"
        assert rounds == "3"
        last.append(mean(values))
    assert last == sorted(last, reverse=True), "the best comes first"
    text = (here / "t.tex").read_text()
    assert text.count(r"\\") == 5 and r"$\pm$" in text
    assert main([*words[:6], "--seeds", "2"]) == 0
    assert capsys.readouterr().out.count("(is there)") == 8


@pytest.mark.parametrize(("text", "values"), [
    ("a=1,2", ["1", "2"]), ("a=(1, 2),(3, 4)", ["(1, 2)", "(3, 4)"]),
    ("a='x,y',z", ["'x,y'", "z"]), ("a=[1],[2,3]", ["[1]", "[2,3]"]),
])  # fmt: skip
def test_commas_within_brackets_separate_nothing(text, values):
    assert [value for _, value in _alternatives(text)] == values


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=1,", "a=1,1"])
def test_a_grid_that_is_none_is_a_sentence(text):
    with pytest.raises(ConfigurationError, match="--grid"):
        _alternatives(text)


@pytest.mark.parametrize(("grid", "sentence"), [
    ("algorithm=fedavg,nope", "has no 'nope'; it has fedavg, scaffold"),
    ("learner.nope=1", "NumpyLearner has no 'nope'"),
])  # fmt: skip
def test_what_is_not_there_is_said_before_anything_runs(here, capsys, grid, sentence):
    assert main(["sweep", "plan.py", "--grid", grid]) == 1
    told = capsys.readouterr()
    assert sentence in told.err
    assert "1 of" not in told.out
