"""Stopping: rules end a run at the round that their definition says, and say why."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy as library

from atoll import Evaluation, schedules
from atoll.errors import ConfigurationError
from atoll.rounds.stopping import Bytes, Hours, Patience, Target, stop_reason
from atoll.simulation import Conditions, Devices
from atoll.tracking.record import Record

NAN = float("nan")


def history(metric, values, up=100, down=50, seconds=1800.0):
    """Rounds with these values of a metric; None for a round that was not evaluated."""
    return [
        Record(
            number, {} if value is None else {metric: value}, {"steps": 5.0 - number},
            4, 4, 1, up, down, number * seconds,
        )
        for number, value in enumerate(values, start=1)
    ]  # fmt: skip


def ends(rules, rounds):
    """The round after which a run with this history ends; None if it goes on."""
    for count in range(1, len(rounds) + 1):
        if stop_reason(rules, rounds[:count]):
            return rounds[count - 1].round
    return None


@pytest.mark.parametrize(
    ("rule", "metric", "values", "last"),
    [
        # The best is round 2; three rounds later nothing has been better.
        (Patience(3), "accuracy", [0.1, 0.5, 0.4, 0.5, 0.3, 0.9], 5),
        (Patience(3), "accuracy", [0.1, 0.5, 0.4, 0.6, 0.3, 0.2, 0.1], 7),
        (Patience(1), "accuracy", [0.1, 0.2, 0.3, 0.3], 4),
        (Patience(1), "accuracy", [0.1, 0.2, 0.3, 0.4], None),
        # Less is better of a loss, and it is what is left where there is no accuracy.
        (Patience(2), "loss", [2.0, 1.0, 1.5, 1.0, 0.1], 4),
        (Patience(2, "loss"), "loss", [2.0, 1.0, 0.5, 0.4], None),
        # Improvements by less than `least` count for none: 0.5, then 0.62 at once.
        (Patience(2, least=0.1), "accuracy", [0.5, 0.55, 0.59, 0.9], 3),
        (Patience(2, least=0.1), "accuracy", [0.5, 0.55, 0.62, 0.63, 0.64], 5),
        # Rounds that were not evaluated, or have no number, pass all the same.
        (Patience(3), "accuracy", [0.5, None, None, None, 0.9], 4),
        (Patience(2), "accuracy", [NAN, NAN, NAN, NAN], None),
        (Patience(2), "accuracy", [NAN, 0.5, NAN, NAN], 4),
        (Patience(2), "accuracy", [None, None, None, None], None),
        # A metric of one's own: fewer are better only if that is said.
        (Patience(2, "words", higher=True), "words", [1.0, 2.0, 1.0, 1.0], 4),
        (Patience(2, "words", higher=False), "words", [1.0, 2.0, 1.0, 0.5], 3),
        (Target("accuracy", 0.8), "accuracy", [0.7, 0.79, 0.8, 0.9], 3),
        (Target("accuracy", 0.8), "accuracy", [0.7, None, NAN], None),
        (Target("loss", 0.5), "loss", [0.6, 0.5, 0.4], 2),
        (Target("words", 10, higher=True), "words", [9.0, 11.0], 2),
        (Target("auc", 0.5), "accuracy", [0.7, 0.9], None),
        # Measurements too: steps are 4, 3, 2, ... and fewer are better.
        (Target("steps", 2.0, higher=False), "accuracy", [0.1] * 5, 3),
        # 150 bytes and half an hour a round.
        (Bytes(450), "accuracy", [0.1] * 6, 3),
        (Bytes(451), "accuracy", [0.1] * 6, 4),
        (Bytes(10_000), "accuracy", [0.1] * 6, None),
        (Hours(1.5), "accuracy", [0.1] * 6, 3),
        (Hours(1.51), "accuracy", [0.1] * 6, 4),
    ],
)  # fmt: skip
def test_a_rule_ends_a_run_at_its_round(rule, metric, values, last):
    assert ends((rule,), history(metric, values)) == last


def test_the_first_rule_that_says_so_ends_it():
    rounds = history("accuracy", [0.1, 0.9, 0.2, 0.2])
    rules = (Bytes(300), Target("accuracy", 0.8))
    assert ends(rules, rounds) == 2
    assert stop_reason(rules, rounds[:2]) == "300 bytes have been moved"
    assert stop_reason(rules[1:], rounds[:2]) == "accuracy has reached 0.9"
    assert stop_reason((), rounds) == "" == stop_reason(rules, [])


@pytest.mark.parametrize(
    "make", [lambda: Patience(0), lambda: Patience(2, least=-1), lambda: Patience(2, least=NAN)]
)
def test_rules_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


def test_only_rules_can_stop_a_plan(federation):
    with pytest.raises(ConfigurationError, match="stop must be rules"):
        replace(federation, stop=(3,))
    assert replace(federation, stop=Bytes(3)).stop == (Bytes(3),)


def test_a_run_ends_when_its_bytes_are_spent(blobs, federation):
    """Four clients get 9 floats a round and send them back: sizes by the safetensors library."""
    down = len(library.save({"algorithm/params": np.zeros(9, np.float32)}))
    names = ("weight", "metric/train_loss", "metric/steps", "metric/seen")
    about = dict.fromkeys(names, " " * 24)
    up = len(library.save({"vectors/delta": np.zeros(9, np.float32)}, about))
    whole = federation.simulate(blobs)
    for rounds in (1, 3, 6):
        for more, last in ((0, rounds), (1, rounds + 1)):
            rule = Bytes(4 * rounds * (up + down) + more)
            run = replace(federation, stop=(rule,)).simulate(blobs)
            assert len(run.history) == min(last, 6)
            assert bool(run.stopped) == (last <= 6)
            # The rounds that there are, are those of the run that was not stopped.
            assert [r.measurements for r in run.history] == [
                r.measurements for r in whole.history[: len(run.history)]
            ]


def test_a_run_ends_when_its_target_is_reached(blobs, federation):
    plan = replace(federation, schedule=schedules.Synchronous(rounds=20, cohort=4))
    plan = replace(plan, evaluation=Evaluation(every=2, clients_every=None))
    whole = plan.simulate(blobs)
    target = whole.history[5].metrics["accuracy"]
    expected = next(r.round for r in whole.history if r.metrics.get("accuracy", 0) >= target)
    run = replace(plan, stop=(Target("accuracy", target),)).simulate(blobs)
    assert len(run.history) == expected
    assert run.stopped == f"accuracy has reached {run.history[-1].metrics['accuracy']:.4g}"
    assert run.metrics == run.history[-1].metrics


def test_the_last_round_is_evaluated_whichever_it_is(blobs, federation):
    plan = replace(federation, evaluation=Evaluation(every=4, clients_every=5))
    spent = sum(r.bytes_up + r.bytes_down for r in plan.simulate(blobs).history[:3])
    run = replace(plan, stop=(Bytes(spent),)).simulate(blobs)
    assert [bool(r.metrics) for r in run.history] == [False, False, True]
    assert {"accuracy", "accuracy_client_mean"} <= set(run.metrics)
    # As if the run had been as long as that.
    short = replace(plan, schedule=replace(plan.schedule, rounds=3)).simulate(blobs)
    assert short.metrics == run.metrics
    assert short.model["params"].tobytes() == run.model["params"].tobytes()


class Hourly(Devices):
    def conditions(self, name, planned_steps, own, today):
        return Conditions(3600 / planned_steps)


def test_simulated_hours_count(blobs, federation):
    run = replace(federation, stop=(Hours(3),)).simulate(blobs, devices=Hourly())
    assert len(run.history) == 3


def test_a_stopped_run_stays_stopped_until_its_rule_allows_more(blobs, federation, tmp_path):
    whole = federation.simulate(blobs, engine="sequential")
    spent = sum(r.bytes_up + r.bytes_down for r in whole.history[:2])
    stopped = replace(federation, stop=(Bytes(spent),))
    first = stopped.simulate(blobs, engine="sequential", folder=tmp_path / "run")
    again = stopped.simulate(blobs, folder=tmp_path / "run", resume=True)
    assert len(first.history) == len(again.history) == 2
    assert again.stopped == first.stopped
    assert again.model["params"].tobytes() == first.model["params"].tobytes()


def test_buffered_runs_end_by_rules_too(blobs, federation):
    schedule = schedules.Buffered(rounds=9, concurrency=4, buffer=2)
    plan = replace(federation, schedule=schedule)
    spent = sum(r.bytes_up + r.bytes_down for r in plan.simulate(blobs).history[:4])
    assert len(replace(plan, stop=(Bytes(spent),)).simulate(blobs).history) == 4
