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
from atoll.rounds.coordinator import Outcome
from atoll.rounds.schedules import Poisson, RoundRobin, Synchronous


def roster(count=8):
    names = [f"site-{member}" for member in range(count)]
    return Roster(names, np.full(count, 10))


def coordinator(**settings):
    defaults = {"rounds": 3, "cohort": 4}
    return Coordinator(Synchronous(**{**defaults, **settings}), Key(0))


def closed(machine):
    """Close a round of one question as soon as that is heard."""
    if machine.phase is Phase.HEARD:
        machine.worked()
        machine.finish()
    return machine


class History(RuleBasedStateMachine):
    """Questions, answers, losses, ticks and restarts in any order, against a plain model.

    The model of an attempt: who is `asked` the open question, who of them has `answered` and who is
    `gone`, how many must answer (`fewest`), and who `worked`: their updates are in the round.
    """

    @initialize(
        cohort=st.integers(1, 4),
        extra=st.integers(0, 3),
        deadline=st.sampled_from([None, 5.0]),
        minimum=st.one_of(st.none(), st.integers(1, 4)),
        poisson=st.booleans(),
    )
    def begin(self, cohort, extra, deadline, minimum, poisson):
        self.schedule = Synchronous(
            rounds=4,
            cohort=cohort,
            invite=cohort + extra,
            deadline=deadline,
            minimum=None if minimum is None else min(minimum, cohort),
            attempts=3,
            **({"selection": Poisson()} if poisson else {}),
        )
        self.least = self.schedule.minimum
        if self.least is None:
            self.least = 0 if poisson else -(-cohort // 2)
        self.machine = Coordinator(self.schedule, Key(1))
        self.now = 0.0
        self.invitations = []
        self.past: set[str] = set()
        self.closed: list[tuple[str, ...]] = []
        self.abandoned = 0

    running = False
    asked: dict[str, str] = {}  # noqa: RUF012 - a fresh one with every question
    answered: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    worked: frozenset[str] = frozenset()
    fewest = step = 0
    due = None

    def look(self):
        """What has become of the open question, by the model's own rules."""
        if not self.running:
            return
        machine, outcome = self.machine, self.machine.outcome
        assert set(machine.asked) == set(self.asked)
        assert set(machine.heard) == self.answered or outcome is not None
        if machine.phase is Phase.OPEN:
            assert set(machine.owed) == set(self.asked) - self.answered - self.gone
            assert machine.owed, "an open question that nobody can answer"
            assert len(self.asked) - len(self.gone) >= self.fewest, "it can never be heard"
            assert machine.step == self.step
        elif machine.phase is Phase.HEARD:
            assert len(self.answered) >= self.fewest
            assert machine.outcome is None
        else:
            self.over(outcome, False)

    def over(self, outcome, closed):
        self.running = False
        assert outcome.closed == closed
        expected = self.worked if closed else self.answered
        assert set(outcome.accepted) == expected, "an accepted update was lost or added"
        members = [int(id.rpartition(".")[2]) for id in outcome.accepted]
        assert members == sorted(members), "not in the order of the roster"
        self.past |= {c.id for c in self.current}
        if closed:
            assert len(outcome.accepted) >= self.least
            assert outcome.reason == ""
            self.closed.append(outcome.accepted)
        else:
            assert outcome.reason
            self.abandoned += 1

    def put(self, asked, fewest):
        """A question is open."""
        self.asked, self.fewest = asked, fewest
        self.answered = self.gone = frozenset()
        wait = self.schedule.deadline
        self.due = None if wait is None else self.now + wait

    @precondition(lambda self: self.machine.phase is Phase.IDLE)
    @rule(several=st.booleans(), data=st.data())
    def open(self, several=False, data=None):
        self.current = list(self.machine.open(roster(), self.now))
        self.running, self.worked, self.step = True, frozenset(), 0
        assert len({i.client for i in self.current}) == len(self.current)
        self.invitations += self.current
        self.put({i.id: i.client for i in self.current}, self.least)
        if several and self.machine.phase is Phase.OPEN:
            # The rule's own number, and its choice of those who are asked first.
            whom = data.draw(st.lists(st.sampled_from(sorted(self.asked)), unique=True, min_size=1))
            fewest = data.draw(st.integers(0, len(whom)))
            self.machine.need(fewest, whom)
            self.put({id: self.asked[id] for id in whom}, max(self.least, fewest))
        self.look()

    current: list = []  # noqa: RUF012 - replaced, never changed

    @precondition(lambda self: self.invitations)
    @rule(
        data=st.data(),
        fault=st.sampled_from(["", "", "", "not a number"]),
        step=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def deliver(self, data, fault, step):
        invitation = data.draw(st.sampled_from(self.invitations))
        step += self.step
        in_time = self.due is None or self.now <= self.due
        wanted = (
            self.running
            and self.machine.phase is Phase.OPEN
            and invitation.id in self.asked
            and invitation.id not in self.answered | self.gone
            and step == self.step
            and in_time
        )
        answer = self.machine.deliver(invitation.id, invitation.client, self.now, fault, step)
        assert answer.accepted == (wanted and not fault)
        if answer.accepted:
            assert invitation.id not in self.answered, "counted twice"
            self.answered |= {invitation.id}
        else:
            assert answer.reason
            if wanted:
                assert answer.verdict is Verdict.MALFORMED
                self.gone |= {invitation.id}
            elif invitation.id in self.answered and step == self.step and self.running:
                assert answer.verdict in (Verdict.DUPLICATE, Verdict.LATE, Verdict.NOT_NEEDED)
        self.look()

    @precondition(lambda self: self.current)
    @rule(data=st.data())
    def deliver_for_another(self, data):
        invitation = data.draw(st.sampled_from(self.current))
        answer = self.machine.deliver(invitation.id, "mallory", self.now, "", self.step)
        assert not answer.accepted
        self.look()

    @rule(name=st.sampled_from(["", "x", "1.0", "9.9.9", "-1.0.0", "1.0.999", "1.0.\u0663"]))
    def deliver_unknown(self, name):
        assert not self.machine.deliver(name, "site-0", self.now, "", self.step).accepted
        self.look()

    @precondition(lambda self: self.current)
    @rule(data=st.data())
    def lose(self, data):
        self.lose_one(data.draw(st.sampled_from(self.current)).id)

    def lose_one(self, id):
        open_ = self.machine.phase is Phase.OPEN and (self.due is None or self.now <= self.due)
        self.machine.lost(id, self.now)
        if self.running and open_ and id in self.asked and id not in self.answered:
            self.gone |= {id}
        self.look()

    @precondition(lambda self: self.machine.phase is Phase.HEARD)
    @rule(data=st.data())
    def ask_more(self, data):
        """The next question, to some of those who answered the last one."""
        if not self.worked and data.draw(st.booleans()):
            self.machine.worked()
            self.worked = self.answered
        answered = dict.fromkeys(sorted(self.answered))
        whom = data.draw(st.lists(st.sampled_from(list(answered)), unique=True)) if answered else []
        fewest = data.draw(st.integers(0, len(whom)))
        self.machine.ask(fewest, whom, self.now)
        self.step += 1
        self.put({id: self.asked[id] for id in whom}, fewest)
        self.look()

    @precondition(lambda self: self.machine.phase is Phase.HEARD)
    @rule()
    def finish(self):
        # Some question is worked for before a round closes, if it is to have updates.
        if not self.worked:
            if len(self.answered) < self.least:
                return
            self.machine.worked()
            self.worked = self.answered
        self.machine.finish()
        self.over(self.machine.outcome, True)

    @precondition(lambda self: self.machine.phase in (Phase.OPEN, Phase.HEARD))
    @rule()
    def abandon(self):
        self.machine.abandon("nothing can be made of it")
        assert self.machine.outcome.reason.startswith("nothing can be made of it")
        self.over(self.machine.outcome, False)

    @precondition(lambda self: self.machine.phase is not Phase.HEARD)
    @rule()
    def say_what_follows_too_early(self):
        early = [self.machine.finish, lambda: self.machine.ask(1, [], self.now)]
        if self.machine.phase is not Phase.OPEN:
            early.append(lambda: self.machine.abandon("x"))
        for what in early:
            with pytest.raises(RunError, match="while the coordinator is"):
                what()

    @rule(seconds=st.floats(0, 4))
    def tick(self, seconds):
        self.now += seconds
        self.machine.tick(self.now)
        self.look()

    @rule()
    def restart(self):
        """A crash: the state goes through JSON into a new machine."""
        state = json.loads(json.dumps(self.machine.state()))
        outcome = self.machine.outcome
        self.machine = Coordinator(self.schedule, Key(1))
        self.machine.restore(state)
        assert json.loads(json.dumps(self.machine.state())) == state
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
        if self.running:
            assert self.worked <= {each.id for each in self.current}

    def teardown(self):
        """Every round ends: report everyone as lost, and the run is over in finitely many steps."""
        if not hasattr(self, "machine"):
            return
        for _ in range(4 * 3 + 1):
            if self.machine.phase is Phase.IDLE:
                self.open()
            for invitation in list(self.current):
                self.lose_one(invitation.id)
            if self.machine.phase is Phase.HEARD:
                self.finish()
            if self.machine.phase is Phase.HEARD:
                self.abandon()
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
    assert closed(machine).outcome.closed
    assert machine.outcome.accepted == tuple(i.id for i in invited[:4])
    assert machine.round == 2


def test_the_deadline_itself_is_still_in_time():
    machine = coordinator(deadline=10.0, minimum=1)
    invited = machine.open(roster(), 5.0)
    assert machine.deliver(invited[0].id, invited[0].client, 15.0).accepted
    assert machine.deliver(invited[1].id, invited[1].client, 15.1).verdict is Verdict.LATE
    assert closed(machine).outcome.closed


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
    assert closed(machine).outcome.closed


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
        closed(machine)
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


def heard(count=4, **settings):
    """A machine whose first question all of its members have answered."""
    machine = coordinator(cohort=count, **settings)
    invited = machine.open(roster(), 0.0)
    for each in invited:
        assert machine.deliver(each.id, each.client, 1.0).accepted
    assert machine.phase is Phase.HEARD
    return machine, invited


def test_a_round_of_two_questions_counts_those_who_worked():
    """As in secure aggregation: who worked and then left is still in the sum."""
    machine, invited = heard(4)
    machine.worked()
    machine.ask(2, [i.id for i in invited], 2.0)
    assert (machine.phase, machine.step, machine.missing) == (Phase.OPEN, 1, 4)
    first, second, third, last = invited
    # An answer to the first question comes a second time, and one to a third that nobody asked.
    assert machine.deliver(first.id, first.client, 3.0, step=0).verdict is Verdict.LATE
    assert machine.deliver(first.id, first.client, 3.0, step=2).verdict is Verdict.UNKNOWN
    assert machine.deliver(first.id, first.client, 3.0, step=1).accepted
    machine.lost(second.id, 3.0)
    machine.lost(last.id, 3.0)
    assert machine.owed == (third.id,)
    assert machine.deliver(third.id, third.client, 4.0, step=1).accepted
    assert machine.phase is Phase.HEARD
    assert machine.heard == (first.id, third.id)
    machine.finish()
    assert machine.outcome.accepted == tuple(i.id for i in invited)
    assert (machine.round, machine.phase) == (2, Phase.IDLE)


def test_a_question_too_few_can_answer_abandons_the_attempt():
    machine, invited = heard(4)
    machine.worked()
    machine.ask(3, [i.id for i in invited], 2.0)
    machine.lost(invited[0].id, 3.0)
    assert machine.phase is Phase.OPEN
    machine.lost(invited[1].id, 3.0)
    assert not machine.outcome.closed
    assert "at most 2 of 4" in machine.outcome.reason
    assert (machine.round, machine.attempt, machine.phase) == (1, 1, Phase.IDLE)


def test_every_question_has_a_deadline_of_its_own():
    machine, invited = heard(4, deadline=10.0)
    machine.worked()
    machine.ask(2, [i.id for i in invited], 8.0)
    assert machine.deadline == 18.0
    for each in invited[:2]:
        assert machine.deliver(each.id, each.client, 17.0, step=1).accepted
    machine.tick(18.0)
    assert machine.phase is Phase.HEARD
    assert machine.deliver(invited[2].id, invited[2].client, 18.0, step=1).verdict is Verdict.LATE


def test_a_rule_may_need_more_updates_than_the_schedule():
    machine = coordinator(cohort=4, minimum=1)
    invited = machine.open(roster(), 0.0)
    machine.need(3)
    machine.lost(invited[0].id, 1.0)
    assert machine.phase is Phase.OPEN
    machine.lost(invited[1].id, 1.0)
    assert not machine.outcome.closed and "at least 3 updates" in machine.outcome.reason


def test_what_cannot_be_averaged_is_an_attempt_and_no_round():
    machine, _ = heard(4, attempts=2)
    machine.abandon("the sum is of another model")
    assert machine.outcome == Outcome(
        False, 1, 0, machine.outcome.accepted, "the sum is of another model"
    )
    assert (machine.round, machine.attempt) == (1, 1)


def test_an_empty_poisson_round_is_a_round():
    """Else its sampling would be another: a draw of nobody has its chance, (1 - q)^n."""
    schedule = Synchronous(rounds=400, cohort=1, selection=Poisson())
    machine, sizes = Coordinator(schedule, Key(0)), []
    for _ in range(400):
        invited = machine.open(roster(4), 0.0)
        sizes.append(len(invited))
        for each in invited:
            machine.deliver(each.id, each.client, 0.0)
        assert closed(machine).outcome.closed
        assert len(machine.outcome.accepted) == len(invited)
    assert machine.phase is Phase.DONE
    # Binomial(4, 1/4): nobody with chance 0.316; five standard deviations of 400 draws.
    empty = np.mean(np.array(sizes) == 0)
    assert abs(empty - 0.75**4) < 5 * np.sqrt(0.75**4 * (1 - 0.75**4) / 400)


def test_a_minimum_holds_under_poisson_too():
    schedule = Synchronous(rounds=3, cohort=1, minimum=1, selection=Poisson(), attempts=1000)
    machine = Coordinator(schedule, Key(0))
    while machine.phase is not Phase.DONE:
        for each in machine.open(roster(4), 0.0):
            machine.deliver(each.id, each.client, 0.0)
        if closed(machine).outcome.closed:
            assert len(machine.outcome.accepted) >= 1
