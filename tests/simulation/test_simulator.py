import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest
import safetensors.numpy as library
from tapped import Tapped

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.algorithms import FedAvg, LocalRule
from atoll.core.random import Key
from atoll.errors import ConfigurationError, DataError, RunError
from atoll.learners import NumpyLearner
from atoll.simulation import (
    Conditions,
    Devices,
    LogNormal,
    RandomDevices,
    Sequential,
    Stragglers,
    Trace,
    TracedDevices,
)
from atoll.tracking import Observer


class Ledger(Observer):
    def __init__(self):
        self.rounds = []

    def round(self, run, end):
        self.rounds.append(list(end.participants))


@dataclass(frozen=True)
class Speeds(Devices):
    """Client i needs i + 1 seconds in all, and sends 1,000 bytes per second."""

    up: float = np.inf

    def conditions(self, name, planned_steps, own, today):
        return Conditions((int(name) + 1) / planned_steps, up=self.up)


def outcome(federation, clients, **given):
    ledger = Ledger()
    run = federation.simulate(clients, seed=0, observers=[ledger], **given)
    return run, ledger.rounds


def with_schedule(federation, **settings):
    return replace(federation, schedule=schedules.Synchronous(**settings))


def test_a_run_learns(blobs, federation):
    run = federation.simulate(blobs, seed=0)
    assert run.metrics["accuracy"] > 0.9
    assert [record.round for record in run.history] == [1, 2, 3, 4, 5, 6]
    assert run.history[-1].accepted == 4


def test_the_ledger_counts_what_the_wire_carries(blobs, federation):
    run, rounds = outcome(federation, blobs)
    # 9 float32 values under the name that they travel by, as the library lays them out.
    down = len(library.save({"algorithm/params": np.zeros(9, np.float32)}))
    for record, parts in zip(run.history, rounds, strict=True):
        assert [part.down for part in parts] == [down] * 4
        assert record.bytes_down == 4 * down
        assert record.bytes_up == sum(part.up for part in parts)
        # The same 9 values changed, with a header that a person could read.
        assert all(36 < part.up < 36 + 400 for part in parts)


def test_scaffold_costs_twice_the_traffic(digits):
    def traffic(algorithm):
        run = Federation(
            learner=NumpyLearner(layers=(64, 10), lr=0.1),
            algorithm=algorithm,
            schedule=schedules.Synchronous(rounds=2),
        ).simulate(digits)
        return run.bytes_up + run.bytes_down

    ratio = traffic(algorithms.Scaffold()) / traffic(algorithms.FedAvg())
    assert ratio == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    "algorithm",
    [algorithms.FedAvg(), algorithms.FedProx(mu=0.1), algorithms.Scaffold(), algorithms.FedAdam()],
)
def test_same_seed_same_bytes(blobs, federation, algorithm):
    federation = replace(
        federation, algorithm=algorithm, pipeline=Clip(0.5, only=("delta",)) >> Mean()
    )
    runs = [federation.simulate(blobs, seed=seed) for seed in (1, 1, 2)]
    bytes_ = [run.model["params"].tobytes() for run in runs]
    assert bytes_[0] == bytes_[1] != bytes_[2]
    assert runs[0].history == runs[1].history


def test_the_order_of_work_does_not_matter(blobs, federation):
    federation = replace(federation, algorithm=algorithms.Scaffold())
    expected = federation.simulate(blobs, seed=0).model["params"].tobytes()
    shuffled = Tapped(lambda turns: None, shuffle=True)
    other = federation.simulate(blobs, seed=0, engine=shuffled)
    assert other.model["params"].tobytes() == expected


def test_the_order_of_delivery_does_not_matter(blobs, federation):
    """Under full participation, devices of any speed deliver in another order: same bytes."""
    federation = with_schedule(federation, rounds=4)
    expected = federation.simulate(blobs, seed=0)
    jittery = RandomDevices(steps_per_second=LogNormal(median=5, sigma=2), jitter=1.0)
    other = federation.simulate(blobs, seed=0, devices=jittery)
    assert other.model["params"].tobytes() == expected.model["params"].tobytes()
    assert other.history[-1].clock > 0 == expected.history[-1].clock


def test_over_selection_takes_the_fastest(blobs, federation):
    federation = with_schedule(federation, rounds=2, cohort=3, invite=8)
    run, rounds = outcome(federation, blobs, devices=Speeds())
    assert [(p.client, p.outcome) for p in rounds[0]] == [
        *((str(i), "accepted") for i in range(3)),
        *((str(i), "no longer needed") for i in range(3, 8)),
    ]
    assert [p.up for p in rounds[0]][3:] == [0] * 5
    assert run.history[0].clock == pytest.approx(3.0)
    assert run.history[1].clock == pytest.approx(6.0)


def test_work_that_cannot_count_is_never_done(blobs, federation):
    done = []

    federation = with_schedule(federation, rounds=2, cohort=3, invite=8)
    federation.simulate(
        blobs, devices=Speeds(), engine=Tapped(lambda turns: done.append(len(turns)))
    )
    assert done == [3, 3]


def test_deadlines_leave_the_slow_behind(blobs, federation):
    federation = with_schedule(federation, rounds=1, cohort=8, deadline=5.0)
    run, rounds = outcome(federation, blobs, devices=Speeds())
    assert [p.outcome for p in rounds[0]] == ["accepted"] * 5 + ["late"] * 3
    assert run.history[0].clock == 5.0


def test_uploads_cut_off_by_the_deadline_count_as_far_as_they_came(blobs, federation):
    federation = with_schedule(federation, rounds=1, cohort=8, deadline=2.1, minimum=1)
    _, rounds = outcome(federation, blobs, devices=Speeds(up=1000.0))
    # Client 1 trains for 2 seconds, then sends 1,000 bytes per second for 0.1 seconds.
    assert rounds[0][0].outcome == "accepted"
    assert rounds[0][1].outcome == "late"
    assert rounds[0][1].up == pytest.approx(100, abs=2)
    assert rounds[0][2].up == 0


def test_adaptive_work_lets_the_slow_take_part(blobs, federation):
    learner = NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10, steps=8)
    schedule = schedules.Synchronous(rounds=1, deadline=4.0, adaptive=True)
    federation = replace(federation, learner=learner, schedule=schedule)
    run, rounds = outcome(federation, blobs, devices=Speeds())
    assert {p.outcome for p in rounds[0]} == {"accepted"}
    # Client i takes (i + 1) / 8 seconds per step, so it can do floor(32 / (i + 1)) of 8 steps.
    steps = [min(8, 32 // (i + 1)) for i in range(8)]
    assert run.history[0].measurements["steps"] == pytest.approx(np.mean(steps))


def test_stragglers_of_fedprox():
    clients = data.synthetic(clients=30, seed=0)
    learner = NumpyLearner(layers=(60, 10), lr=0.01, batch_size=10, epochs=20, zero_init=True)

    def first_round(adaptive):
        federation = Federation(
            learner=learner,
            algorithm=algorithms.FedAvg(),
            schedule=schedules.Synchronous(
                rounds=1, deadline=1 + 1e-6, minimum=1, adaptive=adaptive
            ),
            evaluation=Evaluation(clients_every=None),
        )
        return outcome(federation, clients, devices=Stragglers(share=0.9, epochs=20, seconds=1.0))

    run, rounds = first_round(False)
    # 30 draws at 90 %: more than 8 full workers has probability below 1 %.
    assert 1 <= run.history[0].accepted <= 8
    full = {p.client for p in rounds[0] if p.outcome == "accepted"}
    run, rounds = first_round(True)
    assert run.history[0].accepted == 30
    assert len(full) < 30


def test_drop_outs_are_lost_and_the_round_goes_on(blobs, federation):
    federation = with_schedule(federation, rounds=10, cohort=8, minimum=1)
    devices = RandomDevices(dropout=0.4)
    run, rounds = outcome(federation, blobs, devices=devices)
    lost = sum(p.outcome == "lost" for parts in rounds for p in parts)
    total = sum(map(len, rounds))
    assert 0.25 < lost / total < 0.55
    assert all(p.up == 0 for parts in rounds for p in parts if p.outcome == "lost")
    assert len(run.history) == 10


def test_a_round_below_its_minimum_is_tried_again_and_said(blobs, federation):
    federation = with_schedule(federation, rounds=5, cohort=4, minimum=4, attempts=50)
    run, _ = outcome(federation, blobs, devices=RandomDevices(dropout=0.3))
    assert sum(record.attempts for record in run.history) > 5
    assert all(record.accepted == 4 for record in run.history)
    assert any("was abandoned" in reason for reason in run.refusals)


def test_a_hopeless_run_ends_with_a_sentence(blobs, federation):
    federation = with_schedule(federation, rounds=2, cohort=4, attempts=3)
    with pytest.raises(
        RunError, match=r"round 1 was abandoned 3 times .* of 4 invited clients could still deliver"
    ):
        federation.simulate(blobs, devices=RandomDevices(dropout=1.0))


def test_traces_say_who_is_there(blobs, federation, tmp_path):
    path = tmp_path / "trace.csv"
    rows = ["client,start,end,steps_per_second"]
    rows += [f"{i},0,100,10" for i in range(3)] + [f"{i},50,1000,0.001" for i in range(3, 8)]
    path.write_text("\n".join(rows))
    devices = TracedDevices.read(path)
    federation = with_schedule(federation, rounds=1, cohort=2, minimum=2)
    _, rounds = outcome(federation, blobs, devices=devices)
    assert {p.client for p in rounds[0]} <= {"0", "1", "2"}
    federation = with_schedule(federation, rounds=1, cohort=8, minimum=1)
    assert len(outcome(federation, blobs, devices=devices)[1][0]) == 3


def test_a_client_that_leaves_before_it_delivers_is_lost(blobs, federation):
    traces = {str(i): Trace(((0.0, 0.5 if i % 2 else 99.0),), 1.0) for i in range(8)}
    federation = with_schedule(federation, rounds=1, cohort=8, minimum=1)
    _, rounds = outcome(federation, blobs, devices=TracedDevices(traces))
    assert [p.outcome for p in rounds[0]] == ["accepted", "lost"] * 4


def test_time_passes_until_somebody_is_there(blobs, federation):
    traces = {str(i): Trace(((500.0, 900.0),), 1e3) for i in range(8)}
    federation = with_schedule(federation, rounds=1, cohort=4, pause=1.0)
    run, _ = outcome(federation, blobs, devices=TracedDevices(traces))
    assert run.history[0].attempts == 2
    assert run.history[0].clock >= 500


def test_bad_traces_get_a_sentence(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("client,start\na,0\n")
    with pytest.raises(DataError, match="no column 'end'"):
        TracedDevices.read(path)
    path.write_text("client,start,end\na,0,soon\n")
    with pytest.raises(DataError, match="cannot be read as a device trace"):
        TracedDevices.read(path)


@dataclass(frozen=True, kw_only=True)
class Poisoned(LocalRule):
    """The clients of these sizes send NaN."""

    clients: tuple[str, ...]

    def finish(self, client, local, got, mine):
        change = local.params - got["params"]
        if str(len(client.examples)) in self.clients:
            change = change * np.nan
        return {"delta": change}, mine


def test_a_nan_update_never_touches_the_model(blobs, federation):
    sick = str(int(blobs.sizes().max()))
    schedule = schedules.Synchronous(rounds=3, minimum=1)
    algorithm = FedAvg(local=Poisoned(clients=(sick,)))
    federation = replace(federation, algorithm=algorithm, schedule=schedule)
    run, rounds = outcome(federation, blobs)
    assert np.isfinite(run.model["params"]).all()
    assert [sum(p.outcome == "malformed" for p in parts) for parts in rounds] == [1, 1, 1]
    assert "values that are NaN or infinite" in run.refusals[0]
    assert run.metrics["accuracy"] > 0.8


def test_memory_is_kept_only_for_updates_that_counted(blobs):
    """SCAFFOLD's invariant holds although most deliveries are refused, late or lost."""
    from atoll.simulation import Simulator
    from atoll.tracking import Run

    federation = Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(
            rounds=6, cohort=3, invite=6, deadline=3.0, minimum=1, attempts=50
        ),
    )
    simulator = Simulator(
        federation,
        blobs,
        Run(federation.describe(), {}, 0, 6),
        devices=RandomDevices(steps_per_second=LogNormal(median=2, sigma=1), dropout=0.3, jitter=1),
        engine=Sequential(),
        observers=[],
    )
    simulator.go()
    total = sum(kept["algorithm/control"] for _, kept in simulator.states.values())
    control = simulator.driver.server.state["local.control"]
    assert np.abs(control).max() > 1e-3
    np.testing.assert_allclose(control, total / 8, atol=1e-6)


def test_evaluation_intervals(blobs, federation):
    federation = replace(federation, evaluation=Evaluation(every=4, clients_every=None))
    run = federation.simulate(blobs)
    assert [bool(record.metrics) for record in run.history] == [False] * 3 + [True, False, True]
    assert not any("client" in name for name in run.metrics)
    spread = replace(federation, evaluation=Evaluation(spread=("loss", "macro_f1"))).simulate(blobs)
    assert "macro_f1_client_worst" in spread.metrics


def test_baselines_say_what_federation_gained(digits):
    federation = Federation(
        learner=NumpyLearner(layers=(64, 32, 10), lr=0.1, batch_size=10, epochs=2),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=20),
    )
    run, baselines = federation.simulate(digits), federation.baselines(digits)
    assert (baselines.central.rounds, baselines.local.rounds) == (20, 20)
    local, central = baselines.local.pooled["accuracy"], baselines.central.pooled["accuracy"]
    assert local + 0.2 < run.metrics["accuracy"] < central + 0.03


def binary(labels):
    arrays = {
        name: (np.arange(2 * len(y)).reshape(-1, 2) / 9, np.array(y)) for name, y in labels.items()
    }
    return data.from_clients(arrays, classes=2, test=0.5)


@pytest.mark.parametrize(
    ("evaluation", "labels", "message"),
    [
        (Evaluation(spread=("auc",)), {"a": [0, 1, 0, 1] * 5, "b": [1] * 10}, "only class 1"),
        (Evaluation(spread=("f2",)), {"a": [0, 1]}, "'f2' is not known"),
        (Evaluation(best="rmse"), {"a": [0, 1]}, "'rmse' is not known"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused(evaluation, labels, message):
    federation = Federation(
        learner=NumpyLearner(layers=(2, 2)),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
        evaluation=evaluation,
    )
    with pytest.raises(DataError, match=message):
        federation.simulate(binary(labels))


def test_pooled_auc_is_reported_although_a_client_has_one_class():
    federation = Federation(
        learner=NumpyLearner(layers=(2, 2)),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
    )
    run = federation.simulate(binary({"a": [0, 1, 0, 1] * 5, "b": [1] * 10}))
    assert 0 <= run.metrics["auc"] <= 1


def test_what_is_not_a_population_is_refused(federation):
    dataset = data.from_arrays(np.zeros((4, 2)), np.zeros(4, int), classes=3)
    with pytest.raises(DataError, match="not Dataset; partition a set first"):
        federation.simulate(dataset)


def test_cohorts_larger_than_the_population_are_refused(blobs, federation):
    with pytest.raises(ConfigurationError, match="cohort=9 is larger than the population of 8"):
        with_schedule(federation, rounds=1, cohort=9).simulate(blobs)


def test_a_broken_observer_does_not_hide_behind_the_run(blobs, federation):
    class Broken(Observer):
        closed = False

        def round(self, run, end):
            raise ValueError("mine")

        def close(self):
            self.closed = True

    broken = Broken()
    with pytest.raises(ValueError, match="mine"):
        federation.simulate(blobs, observers=[broken])
    assert broken.closed


def test_availability_by_period(blobs, federation):
    devices = RandomDevices(availability=0.5, period=10.0)
    federation = with_schedule(federation, rounds=8, cohort=2, attempts=20, pause=10.0)
    run, rounds = outcome(federation, blobs, devices=devices)
    assert len(run.history) == 8
    assert all(len(parts) >= 2 for parts in rounds)


def test_nothing_is_logged_in_a_quiet_run(blobs, federation, caplog):
    with caplog.at_level(logging.DEBUG, logger="atoll"):
        federation.simulate(blobs)
    assert caplog.text == ""


def test_an_empty_poisson_round_is_a_round_that_changes_nothing(blobs, federation):
    """Drawing again instead would make another sampling of it, which privacy is accounted for."""
    schedule = schedules.Synchronous(rounds=60, cohort=1, selection=schedules.Poisson())
    plan = replace(
        federation, schedule=schedule, evaluation=Evaluation(every=100, clients_every=None)
    )
    rounds = plan.rounds(blobs, seed=0)
    before = federation.learner.init(Key(0).fold("init"))["params"]
    for record in rounds:
        after = rounds.run.model["params"]
        assert (after.tobytes() == before.tobytes()) == (record.accepted == 0)
        assert record.attempts == 1
        assert np.isfinite(after).all()
        before = after.copy()
    sizes = [record.accepted for record in rounds.run.history]
    # Binomial(8, 1/8): nobody with chance 0.344, five standard deviations of 60 draws.
    assert abs(sizes.count(0) / 60 - (7 / 8) ** 8) < 5 * np.sqrt(0.344 * 0.656 / 60)
    assert rounds.run.refusals == []


def test_a_poisson_round_whose_clients_are_all_lost_is_one_too(blobs, federation):
    schedule = schedules.Synchronous(rounds=3, cohort=4, selection=schedules.Poisson())
    run, rounds = outcome(
        replace(federation, schedule=schedule), blobs, devices=RandomDevices(dropout=1.0)
    )
    assert [record.accepted for record in run.history] == [0, 0, 0]
    assert {p.outcome for parts in rounds for p in parts} <= {"lost"}


def test_a_poisson_round_with_a_minimum_is_drawn_anew(blobs, federation):
    schedule = schedules.Synchronous(
        rounds=20, cohort=1, minimum=1, attempts=100, selection=schedules.Poisson()
    )
    run, _ = outcome(replace(federation, schedule=schedule), blobs)
    assert min(record.accepted for record in run.history) == 1
    assert sum(record.attempts for record in run.history) > 20
