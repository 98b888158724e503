"""Nothing waits for a figure that no round has, and what is a mean says of how many."""

import numpy as np
import pytest

from atoll import Evaluation, Federation, algorithms, data, schedules, stopping
from atoll.errors import AtollError, CheckpointError, ConfigurationError, DataError
from atoll.learners import NumpyLearner

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 4)).astype("f")
Y = (X[:, 0] > 0).astype(int)
SOURCE = data.from_arrays(X, Y)


def plan(rounds=3, **settings):
    return Federation(
        learner=NumpyLearner(layers=(4, 2)),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=rounds),
        **settings,
    )


def untested():
    return SOURCE.iid(clients=5, test=0)


def partly_tested():
    """Two clients of five are too small to hold anything out."""
    held = {f"c{n}": (X[20 * n :][:size], Y[20 * n :][:size]) for n, size in enumerate(SIZES)}
    return data.from_clients(held, test=0.2)


SIZES = (20, 2, 20, 2, 20)


@pytest.mark.parametrize("rule", [stopping.Target("accuracy", 0.9), stopping.Patience(2)])
def test_a_rule_that_waits_for_what_nobody_evaluates_is_refused(rule):
    with pytest.raises(ConfigurationError, match="which is in no round"):
        plan(stop=rule).simulate(untested())


@pytest.mark.parametrize("metric", ["acuracy", "accuracy_client_median", "loss_client_mean"])
def test_a_rule_with_a_metric_that_is_none_is_refused(metric):
    with pytest.raises(ConfigurationError, match=f"waits for '{metric}'.*rounds have accuracy"):
        plan(stop=stopping.Target(metric, 0.9)).simulate(SOURCE.iid(clients=5))


def test_rules_may_wait_for_what_comes_later_and_for_measurements():
    evaluation = Evaluation(every=2, clients_every=3)
    for metric, rounds in [("accuracy", 2), ("accuracy_client_mean", 3), ("train_loss", 1)]:
        rule = stopping.Target(metric, 0.0 if metric != "train_loss" else 1e9)
        run = plan(rounds=6, stop=rule, evaluation=evaluation).simulate(SOURCE.iid(clients=5))
        assert len(run.history) == rounds


def test_models_that_stay_with_clients_have_no_pooled_figures():
    clients = SOURCE.iid(clients=5)
    for wrong in (
        {"stop": stopping.Target("accuracy", 0.9)},
        {"evaluation": Evaluation(best="accuracy")},
    ):
        with pytest.raises(AtollError, match="in no round: rounds have accuracy_client_count"):
            plan(private=("0.bias",), **wrong).simulate(clients)
    run = plan(private=("0.bias",), evaluation=Evaluation(best="accuracy_client_mean")).simulate(
        clients
    )
    assert "(of 5 clients that have test data)" in str(run)


def test_means_over_clients_say_over_how_many():
    run = plan().simulate(partly_tested())
    assert run.metrics["accuracy_client_count"] == 3
    assert len(run.per_client["accuracy"]) == 3


def test_a_run_that_nobody_evaluated_says_so_everywhere(tmp_path, capsys):
    from atoll.cli import main

    pytest.importorskip("matplotlib")
    run = plan().simulate(untested(), folder=tmp_path / "blind")
    plan().simulate(SOURCE.iid(clients=5), folder=tmp_path / "seen")
    assert "not evaluated" in str(run)
    assert run.plot(tmp_path / "plot.png").exists()
    with pytest.raises(CheckpointError, match="no best model: no round has been evaluated"):
        run.best()
    with pytest.raises(ConfigurationError, match="nothing was"):
        run.plot_spread(tmp_path / "spread.png")
    found = plan().baselines(untested())
    assert found.central.own == found.local.own == found.central.pooled == {}
    for command in (
        ["show", str(tmp_path / "blind")],
        ["report", str(tmp_path / "blind")],
        ["compare", str(tmp_path / "blind"), str(tmp_path / "seen")],
        ["compare", str(tmp_path / "seen"), str(tmp_path / "blind")],
    ):
        assert main(command) == 0, capsys.readouterr()
    assert "train_loss" in capsys.readouterr().out
    with pytest.raises(DataError, match="nobody has test data"):
        plan(evaluation=Evaluation(best="accuracy")).simulate(untested())


def test_rounds_to_knows_which_way_is_better():
    run = plan(rounds=6).simulate(SOURCE.iid(clients=5))
    losses = run.series("loss")[1]
    assert losses[-1] < losses[0]
    assert run.rounds_to("loss", losses[3]) == 4
    assert run.rounds_to("loss", -1.0) is None
    assert run.rounds_to("accuracy", 0.0) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: stopping.Patience("4"),
        lambda: stopping.Patience(0),
        lambda: stopping.Patience(3, least=float("nan")),
        lambda: stopping.Target("accuracy", "high"),
        lambda: stopping.Target(0.9, 0.9),
        lambda: stopping.Hours(-1),
        lambda: stopping.Bytes(0.5),
        lambda: schedules.Synchronous(rounds="3"),
        lambda: schedules.Synchronous(rounds=True),
        lambda: NumpyLearner(layers=(4, 2), lr="0.1"),
        lambda: NumpyLearner(layers=(4, 2), batch_size=0),
        lambda: NumpyLearner(layers=(4, 2), max_gradient_norm=float("nan")),
        lambda: Evaluation(every=0.5),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_a_sentence(make):
    with pytest.raises(ConfigurationError):
        make()


def test_numbers_of_numpy_are_numbers():
    learner = NumpyLearner(layers=(4, 2), batch_size=np.int64(4), epochs=np.int32(2))
    schedule = schedules.Synchronous(rounds=np.int64(2), cohort=np.int8(3))
    made = Federation(learner=learner, algorithm=algorithms.FedAvg(), schedule=schedule)
    assert len(made.simulate(SOURCE.iid(clients=5), seed=np.int64(3)).history) == 2
    assert type(made.schedule.rounds) is int
