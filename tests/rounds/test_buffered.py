"""Asynchronous schedules: the papers' rules, in the state machine and in the simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll import Federation, algorithms, schedules
from atoll.aggregation import Spec
from atoll.core.random import Key
from atoll.errors import ConfigurationError, RunError
from atoll.learners import NumpyLearner
from atoll.rounds import Phase, Roster, Verdict
from atoll.rounds.buffered import BufferedCoordinator
from atoll.rounds.schedules import Buffered, Constant, Hinge, Polynomial, fedasync
from atoll.simulation import LogNormal, RandomDevices
from atoll.tracking import RunFolder


def roster(size):
    return Roster([f"c{n}" for n in range(size)], np.ones(size, np.int64))


def test_discounts_are_the_papers():
    """FedAsync, section 5.2; FedBuff, section 5: 1 / sqrt(1 + t)."""
    assert [Constant().discount(t) for t in (0, 9)] == [1, 1]
    assert Polynomial(0.5).discount(0) == 1
    assert Polynomial(0.5).discount(3) == pytest.approx(1 / 2)
    assert Hinge(10, 4).discount(4) == 1
    assert Hinge(10, 4).discount(5) == pytest.approx(1 / 11)


def test_a_step_every_k_updates_and_staleness_is_counted():
    """By hand: buffer of two, three at work; c0's second update began one version ago."""
    machine = BufferedCoordinator(Buffered(rounds=3, concurrency=3, buffer=2), Key(0))
    first = machine.open(roster(3), 0.0)
    assert len(first) == 3
    assert not machine.ready
    a, b, c = first
    assert machine.deliver(a.id, a.client, 1.0).staleness == 0
    assert machine.outcome is None
    assert machine.deliver(b.id, b.client, 2.0).accepted
    assert machine.outcome.accepted == (a.id, b.id)
    assert machine.round == 2
    second = machine.open(roster(3), 2.0)
    assert {i.client for i in second} == {a.client, b.client}
    answer = machine.deliver(c.id, c.client, 3.0)
    assert answer.accepted
    assert answer.staleness == 1
    assert machine.deliver(c.id, c.client, 3.0).verdict is Verdict.DUPLICATE
    assert machine.deliver(c.id, a.client, 3.0).verdict is Verdict.UNKNOWN


def test_too_stale_updates_are_refused_and_make_room():
    machine = BufferedCoordinator(Buffered(rounds=9, concurrency=2, buffer=1, limit=1), Key(0))
    slow, quick = machine.open(roster(2), 0.0)
    for now in range(2):
        assert machine.deliver(quick.id, quick.client, now).accepted
        (quick,) = machine.open(roster(2), now)
    answer = machine.deliver(slow.id, slow.client, 9.0)
    assert answer.verdict is Verdict.STALE
    assert "2 versions old, and 1 are accepted" in answer.reason
    assert machine.ready


@given(
    st.lists(
        st.tuples(st.sampled_from(["deliver", "fault", "lost", "restart"]), st.integers(0, 9)),
        max_size=60,
    )
)
def test_any_history_keeps_the_invariants(events):
    """Never more at work than allowed, one turn per client, every update in exactly one step."""
    schedule = Buffered(rounds=5, concurrency=4, buffer=3)
    machine, members = BufferedCoordinator(schedule, Key(1)), roster(7)
    out, counted = {}, []
    for now, (event, which) in enumerate(events):
        while machine.ready and (new := machine.open(members, now)):
            out |= {i.id: i.client for i in new}
        assert len(out) == len(set(out.values())) <= 4
        if machine.phase is Phase.DONE or not out:
            break
        if event == "restart":
            again = BufferedCoordinator(schedule, Key(1))
            again.restore(machine.state())
            assert again.state() == machine.state()
            machine = again
            continue
        id = sorted(out)[which % len(out)]
        client = out.pop(id)
        if event == "lost":
            machine.lost(id, now)
            assert not machine.deliver(id, client, now).accepted
        else:
            answer = machine.deliver(id, client, now, "NaN" if event == "fault" else "")
            assert answer.accepted == (event == "deliver")
        if machine.outcome is not None:
            assert len(machine.outcome.accepted) == 3
            counted += machine.outcome.accepted
    assert len(counted) == len(set(counted))
    assert machine.round == 1 + len(counted) // 3


@pytest.fixture
def slow_and_quick():
    return RandomDevices(steps_per_second=LogNormal(median=10, sigma=1.0), latency=0.1)


def federation(schedule, **given):
    return Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=given.pop("algorithm", algorithms.FedAvg(weighting="uniform")),
        schedule=schedule,
        **given,
    )


def test_it_learns(blobs, slow_and_quick):
    run = federation(Buffered(rounds=20, concurrency=6, buffer=3)).simulate(
        blobs, devices=slow_and_quick
    )
    assert all(r.accepted == 3 for r in run.history)
    assert run.metrics["accuracy"] > 0.8


def test_fedbuff_by_an_independent_loop(blobs, slow_and_quick):
    """The same federation by a plain event loop over floats: FedBuff's algorithm 1."""
    plan = federation(Buffered(rounds=12, concurrency=5, buffer=3))
    run = plan.simulate(blobs, seed=3, devices=slow_and_quick, engine="sequential")
    assert max(r.measurements["most_stale"] for r in run.history) >= 1
    np.testing.assert_allclose(
        run.model["params"], by_hand(plan, blobs, slow_and_quick, 3), rtol=2e-5, atol=1e-6
    )


def test_fedasync_by_an_independent_loop(blobs, slow_and_quick):
    """w <- (1 - a s) w + a s w_client (FedAsync, algorithm 1), a = 0.6."""
    plan = federation(
        fedasync(rounds=20, concurrency=4, staleness=Hinge(10, 1)),
        algorithm=algorithms.FedProx(
            mu=0.005, weighting="uniform", server=algorithms.server.SGD(0.6)
        ),
    )
    run = plan.simulate(blobs, seed=1, devices=slow_and_quick, engine="sequential")
    np.testing.assert_allclose(
        run.model["params"], by_hand(plan, blobs, slow_and_quick, 1), rtol=2e-5, atol=1e-6
    )


def by_hand(plan, data, devices, seed):
    """Asynchronous training in float64 with a sorted list of who is at work."""
    from atoll.rounds.task import ClientTask, Received, assignment_for, run_task
    from atoll.simulation.devices import device_key

    schedule, key = plan.schedule, Key(seed)
    machine = BufferedCoordinator(schedule, key)  # for who is drawn only
    w = plan.learner.init(key.fold("init"))["params"].astype(np.float64)
    members = Roster(data.names, data.sizes())
    versions, at_work, now, buffer = {}, [], 0.0, []
    lr = plan.algorithm.server.lr
    size = 4 * w.size  # latency only: bytes cost nothing here
    assert size
    while True:
        while machine.ready and (new := machine.open(members, now)):
            versions[machine.round - 1] = w.astype(np.float32)
            for i in new:
                own = device_key(key, i.client)
                planned = plan.learner.planned_steps(data.size(i.member))
                today = own.fold(i.round, i.attempt)
                c = devices.conditions(i.client, planned, own, today)
                at_work.append((now + 0.2 + planned * c.seconds_per_step, i))
        at_work.sort(key=lambda item: item[0])
        now, i = at_work.pop(0)
        began = versions[i.round - 1]
        about = assignment_for(key, i.client, i.round, i.turn, 1.0)
        task = ClientTask(i.member, i.client, about, {}, i.turn)
        update, _ = run_task(plan, Received({"params": began}), task, data.train(i.member))
        answer = machine.deliver(i.id, i.client, now)
        s = schedule.staleness.discount(answer.staleness)
        delta = update.vectors["delta"].astype(np.float64)
        buffer.append(s * (began + delta - w) if schedule.pull else s * delta)
        if machine.outcome is not None:
            w = w + lr * np.mean(buffer, axis=0)
            buffer = []
            if machine.phase is Phase.DONE:
                return w


def test_same_bytes_on_every_engine_and_after_a_restart(blobs, slow_and_quick, tmp_path):
    schedule = Buffered(rounds=8, concurrency=5, buffer=3, staleness=Constant())
    plan = federation(schedule, algorithm=algorithms.Scaffold())
    given = {"seed": 5, "devices": slow_and_quick}
    whole = plan.simulate(blobs, engine="sequential(workers=1)", **given)
    for engine in ("sequential(workers=4)", "sequential(processes=2)"):
        assert same(plan.simulate(blobs, engine=engine, **given), whole)
    half = replace(plan, schedule=replace(plan.schedule, rounds=4))
    half.simulate(blobs, engine="sequential", folder=RunFolder(tmp_path / "run", every=2), **given)
    rest = plan.simulate(blobs, folder=tmp_path / "run", resume=True, **given)
    assert same(rest, whole)
    assert [r.clock for r in rest.history] == [r.clock for r in whole.history]


def test_the_control_of_the_server_is_the_mean_of_its_clients(blobs, slow_and_quick):
    schedule = Buffered(rounds=12, concurrency=5, buffer=3, staleness=Constant())
    rounds = federation(schedule, algorithm=algorithms.Scaffold()).rounds(
        blobs, seed=5, devices=slow_and_quick
    )
    run = rounds.go()
    assert run.metrics
    simulator = rounds._simulator
    own = sum(state["algorithm/control"].astype(float) for _, state in simulator.states.values())
    (control,) = (v for name, v in simulator.driver.server.state.items() if "control" in name)
    np.testing.assert_allclose(control, own / len(blobs), atol=1e-6)
    assert np.abs(control).max() > 1e-3


def test_what_a_discount_would_falsify_is_refused():
    for algorithm in (algorithms.Scaffold(), Counting()):
        with pytest.raises(ConfigurationError, match=r"staleness=schedules.Constant"):
            federation(Buffered(rounds=8, concurrency=5, buffer=3), algorithm=algorithm)


class Counting(algorithms.FedAvg):
    """Counts beside its change."""

    def reports(self, shared):
        return {"delta": shared.size, "counts": Spec((1,), "int64")}


def same(a, b):
    return a.model["params"].tobytes() == b.model["params"].tobytes()


class Sometimes(algorithms.LocalRule):
    """Diverges at clients of an odd number of examples."""

    def finish(self, client, local, got, mine):
        change = local.params - got["params"]
        return {"delta": change * (np.nan if client.count % 2 else 1)}, mine


def test_faulty_updates_are_refused_and_others_take_their_place(blobs, slow_and_quick):
    algorithm = algorithms.FedAvg(local=Sometimes())
    plan = federation(Buffered(rounds=4, concurrency=5, buffer=2), algorithm=algorithm)
    run = plan.simulate(blobs, devices=slow_and_quick, engine="sequential")
    assert len(run.history) == 4
    assert np.isfinite(run.model["params"]).all()
    assert any("NaN" in reason for reason in run.refusals)


def test_a_run_that_only_diverges_ends_with_a_sentence(blobs):
    class Never(algorithms.LocalRule):
        def finish(self, client, local, got, mine):
            return {"delta": (local.params - got["params"]) * np.nan}, mine

    plan = federation(
        Buffered(rounds=4, concurrency=5, buffer=2), algorithm=algorithms.FedAvg(local=Never())
    )
    with pytest.raises(RunError, match="training diverges"):
        plan.simulate(blobs, engine="sequential")


def test_settings_that_cannot_work_are_refused(blobs):
    with pytest.raises(ConfigurationError, match="buffer=1"):
        Buffered(rounds=1, concurrency=2, buffer=2, pull=True)
    with pytest.raises(ConfigurationError, match="Poisson"):
        Buffered(rounds=1, concurrency=2, selection=schedules.Poisson())
    with pytest.raises(ConfigurationError, match="larger than the population"):
        federation(Buffered(rounds=1, concurrency=9)).simulate(blobs)


def test_every_step_has_its_updates_also_where_some_are_refused(blobs, slow_and_quick):
    algorithm = algorithms.FedAvg(local=Sometimes())
    plan = federation(Buffered(rounds=5, concurrency=5, buffer=3), algorithm=algorithm)
    run = plan.simulate(blobs, devices=slow_and_quick, engine="sequential")
    assert [r.accepted for r in run.history] == [3] * 5


def test_a_state_is_a_copy():
    machine = BufferedCoordinator(Buffered(rounds=9, concurrency=2, buffer=2), Key(0))
    first, _ = machine.open(roster(3), 0.0)
    before = machine.state()
    machine.deliver(first.id, first.client, 1.0)
    assert before["buffer"] == []
    assert before["past"] == {}


def test_whoever_comes_after_the_end_makes_room_should_it_go_on():
    machine = BufferedCoordinator(Buffered(rounds=1, concurrency=2, buffer=1), Key(0))
    one, two = machine.open(roster(2), 0.0)
    assert machine.deliver(one.id, one.client, 1.0).accepted
    assert machine.phase is Phase.DONE
    assert machine.deliver(two.id, two.client, 2.0).verdict is Verdict.NOT_NEEDED
    longer = BufferedCoordinator(Buffered(rounds=2, concurrency=2, buffer=1), Key(0))
    longer.restore(machine.state())
    assert len(longer.open(roster(2), 3.0)) == 2


def test_resumed_with_narrow_links_it_is_the_same(blobs, tmp_path):
    devices = RandomDevices(
        steps_per_second=LogNormal(median=10, sigma=1.0),
        down=LogNormal(median=500, sigma=0.5),
        up=LogNormal(median=300, sigma=0.5),
    )
    plan = federation(Buffered(rounds=8, concurrency=5, buffer=3))
    whole = plan.simulate(blobs, engine="sequential", devices=devices)
    half = replace(plan, schedule=replace(plan.schedule, rounds=4))
    half.simulate(blobs, engine="sequential", devices=devices, folder=tmp_path / "run")
    rest = plan.simulate(blobs, devices=devices, folder=tmp_path / "run", resume=True)
    assert same(rest, whole)
    assert [r.clock for r in rest.history] == [r.clock for r in whole.history]


def test_statistics_of_several_versions_cannot_be_added_up():
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with pytest.raises(ConfigurationError, match="use GroupNorm"):
        Federation(
            learner=TorchLearner(module, lr=0.1, batch_size=4),
            algorithm=algorithms.FedAvg(),
            schedule=Buffered(rounds=1, concurrency=2, buffer=1),
        )
