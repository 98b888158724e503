"""Devices and deadlines: who is in time, who is lost, and when nobody need work."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tapped import Tapped

from atoll import schedules
from atoll.errors import DataError
from atoll.learners import NumpyLearner
from atoll.simulation import RandomDevices, Stragglers, Trace, TracedDevices
from atoll.tracking import Observer


class Outcomes(Observer):
    def __init__(self):
        self.counts = Counter()

    def round(self, run, end):
        self.counts.update((p.client, p.outcome) for p in end.participants)


def test_equally_fast_clients_are_accepted_equally_often(blobs, federation):
    schedule = schedules.Synchronous(rounds=300, cohort=3, invite=5)
    outcomes = Outcomes()
    replace(federation, schedule=schedule).simulate(blobs, observers=[outcomes])
    accepted = [outcomes.counts[str(i), "accepted"] for i in range(8)]
    # 900 acceptances over 8 clients: five standard deviations around 112.
    assert max(abs(count - 112.5) for count in accepted) < 5 * np.sqrt(112.5)


@pytest.mark.parametrize("seconds", [0.7, 1.0, 3.3])
def test_work_that_fills_the_deadline_is_in_time(blobs, federation, seconds):
    schedule = schedules.Synchronous(rounds=20, deadline=seconds, minimum=1)
    outcomes = Outcomes()
    devices = Stragglers(share=0.0, seconds=seconds)
    learner = NumpyLearner(layers=(2, 3), batch_size=3, epochs=7)
    federation = replace(federation, schedule=schedule, learner=learner)
    federation.simulate(blobs, devices=devices, observers=[outcomes])
    assert {outcome for _, outcome in outcomes.counts} == {"accepted"}


def test_a_drop_out_without_a_deadline_does_not_end_the_run(blobs, federation):
    federation = replace(federation, schedule=schedules.Synchronous(rounds=30, cohort=8))
    outcomes = Outcomes()
    run = federation.simulate(blobs, devices=RandomDevices(dropout=0.1), observers=[outcomes])
    assert len(run.history) == 30
    totals = Counter()
    for (_, outcome), count in outcomes.counts.items():
        totals[outcome] += count
    # Each round is one attempt that waits for whoever is left: nobody is late, or asked anew.
    assert set(totals) == {"accepted", "lost"}
    assert totals["accepted"] + totals["lost"] == 30 * 8
    assert [record.accepted for record in run.history] != [8] * 30
    assert sum(record.accepted for record in run.history) == totals["accepted"]
    # 240 draws at 10 %: four standard deviations around 24.
    assert abs(totals["lost"] - 24) < 4 * np.sqrt(240 * 0.1 * 0.9)


def test_rounds_that_cannot_reach_their_minimum_train_nobody(blobs, federation):
    done = []

    traces = {str(i): Trace(((0.0, 9.0),) if i < 3 else ((50.0, 99.0),), 1e3) for i in range(8)}
    schedule = schedules.Synchronous(rounds=1, cohort=5, minimum=5, pause=1.0)
    replace(federation, schedule=schedule).simulate(
        blobs, devices=TracedDevices(traces), engine=Tapped(lambda turns: done.append(len(turns)))
    )
    assert done == [5]


def test_intervals_that_touch_or_overlap_are_one():
    assert Trace(((10.0, 20.0), (0.0, 10.0), (5.0, 7.0))).intervals == ((0.0, 20.0),)
    devices = TracedDevices({"a": Trace(((0.0, 5.0), (20.0, 24.0)))}, period=24.0)
    assert devices.leaves("a", 22.0) == 29.0
    assert devices.leaves("a", 10.0) is None
    for intervals, speed in ((((3.0, 1.0),), 1.0), (((0.0, 1.0),), 0.0)):
        with pytest.raises(DataError):
            Trace(intervals, speed)
