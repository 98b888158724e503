"""The coordinator through random histories, and its rules one by one."""

import json

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from atoll.core.random import Key
from atoll.errors import CheckpointError, ConfigurationError, RunError
from atoll.rounds import Coordinator, Phase, Roster, Verdict
from atoll.rounds.schedules import Poisson, RoundRobin, Synchronous


def roster(count=8):
    names = [f"site-{member}" for member in range(count)]
    return Roster(names, np.full(count, 10))


def coordinator(**settings):
    defaults = {"rounds": 3, "cohort": 4}
    return Coordinator(Synchronous(**{**defaults, **settings}), Key(0))


class History(RuleBasedStateMachine):
    """Opens, deliveries, losses, ticks and restarts in any order, against a plain model."""

    @initialize(
        cohort=st.integers(1, 4),
        extra=st.integers(0, 3),
        deadline=st.sampled_from([None, 5.0]),
        minimum=st.integers(1, 4),
        poisson=st.booleans(),
    )
    def begin(self, cohort, extra, deadline, minimum, poisson):
        self.schedule = Synchronous(
            rounds=4,
            cohort=cohort,
            invite=cohort + extra,
            deadline=deadline,
            minimum=min(minimum, cohort),
            attempts=3,
            **({"selection": Poisson()} if poisson else {}),
        )
        self.machine = Coordinator(self.schedule, Key(1))
        self.now = 0.0
        self.invitations = []
        self.current = []
        self.accepted: dict[str, int] = {}
        self.closed: list[tuple[str, ...]] = []
        self.abandoned = 0

    def note(self):
        """Look at the outcome once, when an attempt has just ended."""
        outcome = self.machine.outcome
        if outcome is None or not self.running:
            return
        self.running = False
        mine = {i for i in self.accepted if i in {c.id for c in self.current}}
        assert set(outcome.accepted) == mine, "an accepted update was lost or added"
        if outcome.closed:
            assert len(outcome.accepted) >= self.schedule.fewest(8)
            self.closed.append(outcome.accepted)
        else:
            assert len(outcome.accepted) < self.schedule.fewest(8)
            assert outcome.reason
            self.abandoned += 1

    running = False

    @precondition(lambda self: self.machine.phase is Phase.IDLE)
    @rule()
    def open(self):
        self.running = True
        self.current = list(self.machine.open(roster(), self.now))
        assert len({i.client for i in self.current}) == len(self.current)
        self.invitations += self.current
        self.note()

    @precondition(lambda self: self.invitations)
    @rule(data=st.data(), fault=st.sampled_from(["", "", "", "not a number"]))
    def deliver(self, data, fault):
        invitation = data.draw(st.sampled_from(self.invitations))
        answer = self.machine.deliver(invitation.id, invitation.client, self.now, fault)
        if answer.accepted:
            assert invitation.id not in self.accepted, "counted twice"
            assert not fault
            assert invitation in self.current
            self.accepted[invitation.id] = invitation.round
        else:
            assert answer.reason
            if invitation.id in self.accepted and invitation in self.current and self.running:
                assert answer.verdict in (Verdict.DUPLICATE, Verdict.LATE, Verdict.NOT_NEEDED)
        self.note()

    @precondition(lambda self: self.current)
    @rule(data=st.data())
    def deliver_for_another(self, data):
        invitation = data.draw(st.sampled_from(self.current))
        answer = self.machine.deliver(invitation.id, "mallory", self.now)
        assert not answer.accepted
        self.note()

    @rule(name=st.sampled_from(["", "x", "1.0", "9.9.9", "-1.0.0", "1.0.999", "1.0.\u0663"]))
    def deliver_unknown(self, name):
        assert not self.machine.deliver(name, "site-0", self.now).accepted
        self.note()

    @precondition(lambda self: self.current)
    @rule(data=st.data())
    def lose(self, data):
        self.machine.lost(data.draw(st.sampled_from(self.current)).id, self.now)
        self.note()

    @rule(seconds=st.floats(0, 4))
    def tick(self, seconds):
        self.now += seconds
        self.machine.tick(self.now)
        self.note()

    @rule()
    def restart(self):
        """A crash: the state goes through JSON into a new machine."""
        state = json.loads(json.dumps(self.machine.state()))
        outcome = self.machine.outcome
        self.machine = Coordinator(self.schedule, Key(1))
        self.machine.restore(state)
        self.machine.outcome = outcome

    @invariant()
    def rounds_and_updates_add_up(self):
        if not hasattr(self, "machine"):
            return
        flat = [name for accepted in self.closed for name in accepted]
        assert len(flat) == len(set(flat)), "an update is in two rounds"
        assert len(self.closed) == self.machine.round - 1
        if self.machine.phase is Phase.DONE:
            assert len(self.closed) == self.schedule.rounds

    def teardown(self):
        """Every round ends: report everyone as lost, and the run is over in finitely many steps."""
        if not hasattr(self, "machine"):
            return
        for _ in range(4 * 3 + 1):
            if self.machine.phase is Phase.IDLE:
                self.open()
            for invitation in list(self.current):
                self.machine.lost(invitation.id, self.now)
            self.note()
            if self.machine.phase in (Phase.DONE, Phase.FAILED):
                break
        assert self.machine.phase in (Phase.DONE, Phase.FAILED)


History.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_random_histories = History.TestCase


def test_a_round_closes_when_enough_have_delivered():
    machine = coordinator(invite=6)
    invited = machine.open(roster(), 0.0)
    assert len(invited) == 6
    verdicts = [machine.deliver(i.id, i.client, 1.0).verdict for i in invited]
    assert verdicts == [Verdict.ACCEPTED] * 4 + [Verdict.NOT_NEEDED] * 2
    assert machine.outcome.closed
    assert machine.outcome.accepted == tuple(i.id for i in invited[:4])
    assert machine.round == 2


def test_the_deadline_itself_is_still_in_time():
    machine = coordinator(deadline=10.0, minimum=1)
    invited = machine.open(roster(), 5.0)
    assert machine.deliver(invited[0].id, invited[0].client, 15.0).accepted
    assert machine.deliver(invited[1].id, invited[1].client, 15.1).verdict is Verdict.LATE
    assert machine.outcome.closed


def test_a_round_below_its_minimum_is_abandoned_and_drawn_anew():
    machine = coordinator(deadline=10.0, minimum=3)
    first = machine.open(roster(), 0.0)
    machine.deliver(first[0].id, first[0].client, 1.0)
    machine.tick(10.0)
    assert not machine.outcome.closed
    assert "1 of 4" in machine.outcome.reason
    assert (machine.round, machine.attempt) == (1, 1)
    second = machine.open(roster(), 20.0)
    assert [i.client for i in first] != [i.client for i in second]
    late = machine.deliver(first[1].id, first[1].client, 21.0)
    assert late.verdict is Verdict.LATE
    assert "round 1 is over" in late.reason


def test_a_run_gives_up_after_its_attempts():
    machine = coordinator(attempts=2)
    for _ in range(2):
        for invitation in machine.open(roster(), 0.0):
            machine.lost(invitation.id, 1.0)
    assert machine.phase is Phase.FAILED
    with pytest.raises(RunError, match="cannot be opened while the coordinator is failed"):
        machine.open(roster(), 2.0)


def test_a_malformed_update_counts_as_lost():
    machine = coordinator(cohort=2, minimum=1)
    one, two = machine.open(roster(), 0.0)
    answer = machine.deliver(one.id, one.client, 1.0, "it holds NaN")
    assert (answer.verdict, answer.reason) == (
        Verdict.MALFORMED,
        f"the update of {one.client} was refused: it holds NaN",
    )
    assert not machine.deliver(one.id, one.client, 2.0).accepted
    assert machine.deliver(two.id, two.client, 3.0).accepted
    assert machine.outcome.closed


def test_whole_population_and_round_robin():
    everyone = coordinator(cohort=None).open(roster(5), 0.0)
    assert [i.member for i in everyone] == [0, 1, 2, 3, 4]
    machine = coordinator(cohort=3, selection=RoundRobin())
    seen = []
    for _ in range(3):
        invited = machine.open(roster(8), 0.0)
        seen.append([i.member for i in invited])
        for invitation in invited:
            machine.deliver(invitation.id, invitation.client, 0.0)
    assert seen == [[0, 1, 2], [3, 4, 5], [0, 6, 7]]
    assert machine.phase is Phase.DONE


def test_damaged_states_are_refused():
    with pytest.raises(CheckpointError, match="damaged"):
        coordinator().restore({"phase": "open"})
    with pytest.raises(CheckpointError, match="damaged"):
        coordinator().restore({**coordinator().state(), "phase": "asleep"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be"),
        ({"cohort": 2.5}, "cohort must be"),
        ({"cohort": 4, "invite": 3}, "at least the cohort"),
        ({"cohort": 4, "minimum": 5}, "no round could close"),
        ({"deadline": 0.0}, "deadline must be positive"),
        ({"adaptive": True}, "needs a deadline"),
    ],
)
def test_bad_schedules_get_a_sentence(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Synchronous(**{"rounds": 3, **settings})


def test_a_cohort_larger_than_the_population_is_refused():
    with pytest.raises(ConfigurationError, match="cohort=9 is larger than the population of 8"):
        coordinator(cohort=9).open(roster(8), 0.0)
