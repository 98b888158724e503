"""The simulator: brings virtual time and an engine to the driver's rounds."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from atoll.aggregation.conversation import Ask
from atoll.aggregation.validate import validate
from atoll.backends.backend import Backend, Engine, cores
from atoll.core import safetensors
from atoll.core.numbers import whole
from atoll.core.random import Key
from atoll.core.vectors import Tree, Vector, Vectors, flatten, nest
from atoll.data.federated import FederatedData
from atoll.errors import (
    AtollError,
    CannotClose,
    ConfigurationError,
    RunError,
    UpdateRefused,
)
from atoll.learners.base import stacking
from atoll.rounds.client_states import ClientStates
from atoll.rounds.coordinator import Coordinator, Invitation, Phase, Verdict
from atoll.rounds.driver import Driver, whom_of
from atoll.rounds.evaluate import (
    ClientFigures,
    check_evaluation,
    evaluate_clients,
    evaluate_own,
    evaluate_pooled,
    has_own_models,
    judged,
    reported,
    spread_metrics,
)
from atoll.rounds.messages import message_size, schema_size
from atoll.rounds.plan import Plan
from atoll.rounds.roster import Roster
from atoll.rounds.stopping import check_rules, stop_reason
from atoll.rounds.task import (
    ClientTask,
    Received,
    TaskResult,
    answer_question,
    first_state,
    with_question,
)
from atoll.simulation.attackers import Attacked, Attackers
from atoll.simulation.devices import Devices
from atoll.simulation.interrupt import Interrupted, Interruption
from atoll.simulation.timing import Arrival, Load, Timing
from atoll.tracking.observer import Observer, RoundEnd, Snapshot
from atoll.tracking.record import Participant, Record, Run

REFUSALS_KEPT = 1000


@dataclass(frozen=True)
class Gathered:
    """What a round's clients did, and how it went.

    `learned` are the new states of those whose updates count; `origins` the version that each of
    them began from and its staleness.
    """

    learned: dict[int, Tree]
    participants: list[Participant]
    invited: int
    origins: list[tuple[int, int]]
    attempts: int


@dataclass
class _Attempt:
    """An attempt at a round in the making."""

    invitations: Sequence[Invitation]
    received: Tree
    learned: dict[int, Tree] = field(default_factory=dict)
    kept: dict[str, Vectors] = field(default_factory=dict)
    parts: dict[str, Participant] = field(default_factory=dict)

    def note(self, invitation: Invitation, outcome: str, down: int, up: int) -> None:
        """Add a message each way to a client's part in it."""
        before = self.parts[invitation.id]
        self.parts[invitation.id] = Participant(
            invitation.client, outcome, before.down + down, before.up + up
        )

    def close(self, accepted: Collection[str]) -> None:
        """It closed, with the updates of these; whoever only answered a question was not needed."""
        for id, part in self.parts.items():
            counted = part.outcome == Verdict.ACCEPTED
            if counted != (id in accepted):
                verdict = Verdict.NOT_NEEDED if counted else Verdict.ACCEPTED
                self.parts[id] = part._replace(outcome=verdict)


class Simulator:
    """One simulated run of a plan over a population.

    The model's arithmetic is the engine's and the rounds are the driver's; here is virtual time. A
    task is run only when its answer can still count, so work that comes too late costs nothing
    real, and what is run is accepted, unless it is faulty.
    """

    def __init__(
        self,
        plan: Plan,
        data: FederatedData,
        run: Run,
        *,
        devices: Devices,
        engine: Engine,
        observers: Sequence[Observer],
        attackers: Attackers | None = None,
        initial: Vectors | None = None,
    ) -> None:
        if not isinstance(devices, Devices):
            raise ConfigurationError(f"devices must be Devices, not {devices!r}")
        if not isinstance(engine, Engine):
            raise ConfigurationError(
                f"engine must be 'auto', 'sequential', 'stacked' or one of atoll.simulation's "
                f"engines, not {engine!r}"
            )
        run.seed = whole("the seed", run.seed)
        plan.check_data(data)
        check_evaluation(plan, data)
        plan.schedule.needed(len(data))
        self.plan, self.data, self.run = plan, data, run
        self.devices, self.engine, self.observers = devices, engine, observers
        self.key = Key(run.seed)
        self.working = _attacked(plan, attackers, data, self.key)
        self.driver = Driver(plan, self.key, initial=initial)
        self.backend: Backend
        self.states = ClientStates()
        self.clock = 0.0
        #: What clients learned in the round that is being evaluated, and is not yet kept.
        self._learned_now: dict[int, Tree] = {}
        self._sizes = data.sizes()
        self._resources = devices.resources(data.names, self.key)
        self.timing = Timing(plan, data.names, self._sizes, devices, self.key)
        self._up = schema_size(plan.stages.message)
        self._load = Load(0, self._up)
        self._closed = self._snapshot()

    @property
    def coordinator(self) -> Coordinator:
        """The state machine of the schedule."""
        assert isinstance(self.driver.coordinator, Coordinator)
        return self.driver.coordinator

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same plan, data and seed."""
        self.driver.server.restore(dict(snapshot.vectors))
        self.driver.coordinator.restore(dict(snapshot.coordinator))
        self.states.update(snapshot.states)
        self.clock = snapshot.clock
        self._closed = snapshot

    def go(self) -> Run:
        """Run to the end."""
        for _ in self.rounds():
            pass
        return self.run

    def rounds(self) -> Generator[Record]:
        """Round after round; observers are told, and closed whatever happens."""
        self.run.model = self.driver.server.model()
        try:
            for observer in self.observers:
                observer.begin(self.run)
            with (
                Interruption() as interruption,
                self.engine.open(self.working, self.data, self.key) as self.backend,
            ):
                self.run.stopped = stop_reason(self.plan.stop, self.run.history)
                while not self._over:
                    self._round(interruption)
                    yield self.run.history[-1]
            for observer in self.observers:
                observer.end(self.run)
        except BaseException:
            for observer in self.observers:
                # What went wrong may be the very disk that a keeper writes to.
                with contextlib.suppress(AtollError):
                    observer.interrupted(self.run, self._closed)
            raise
        finally:
            for observer in self.observers:
                observer.close()

    @property
    def _over(self) -> bool:
        phase = self.driver.coordinator.phase
        return bool(self.run.stopped) or phase in (Phase.DONE, Phase.FAILED)

    def _round(self, interruption: Interruption) -> None:
        """What clients do until the round closes, then the step, the evaluation, the report."""
        started = time.perf_counter()
        round = self.driver.coordinator.round
        gathered = self._gather(round, interruption)
        clients = time.perf_counter()
        measurements = self.driver.step(round, gathered.origins, self._began)
        self.run.model = self.driver.server.model()
        self.run.engine, self.run.engine_notes = str(self.backend.engine), self.backend.notes
        stepped = time.perf_counter()
        self._learned_now = gathered.learned
        record = self._record(round, gathered, measurements, {})
        record = replace(record, metrics=self._evaluate(round, last=False))
        if not self.run.history:
            names = reported(self.plan, self.data) | {*record.metrics, *measurements}
            check_rules(self.plan.stop, names)
        self.run.stopped = stop_reason(self.plan.stop, [*self.run.history, record])
        if self.run.stopped:
            record = replace(record, metrics={**record.metrics, **self._evaluate(round, last=True)})
        evaluated = time.perf_counter()
        phases = {
            "clients": clients - started, "step": stepped - clients,
            "evaluation": evaluated - stepped,
        }  # fmt: skip
        seconds = time.perf_counter() - started
        self.run.seconds += seconds
        # Together, so that whatever stops the run finds all of a round or nothing of it.
        self.run.history.append(record)
        for member, state in gathered.learned.items():
            self.states[member] = round, flatten(state)
        self._learned_now = {}
        self._closed = self._snapshot()
        end = RoundEnd(record, gathered.participants, self._closed, seconds, phases)
        for observer in self.observers:
            observer.round(self.run, end)
        if interruption.requested:
            raise Interrupted(round)

    def _record(
        self,
        round: int,
        gathered: Gathered,
        measurements: Mapping[str, float],
        metrics: Mapping[str, float],
    ) -> Record:
        parts = gathered.participants
        return Record(
            round,
            metrics,
            measurements,
            gathered.invited,
            len(gathered.origins),
            gathered.attempts,
            sum(part.up for part in parts),
            sum(part.down for part in parts),
            self.clock,
        )

    def _began(self, version: int) -> Vector:
        raise RunError("under this schedule every update begins from the newest model")

    def _gather(self, round: int, interruption: Interruption) -> Gathered:
        """Attempts at the round until one closes."""
        participants: list[Participant] = []
        attempts = 0
        while True:
            attempt = self._attempt(interruption)
            parts = [attempt.parts[invitation.id] for invitation in attempt.invitations]
            participants += parts
            attempts += 1
            outcome = self.coordinator.outcome
            assert outcome is not None
            if outcome.closed:
                counted = {
                    each.member for each in attempt.invitations if each.id in outcome.accepted
                }
                learned = {m: state for m, state in attempt.learned.items() if m in counted}
                origins = [(round - 1, 0)] * len(outcome.accepted)
                return Gathered(learned, participants, len(parts), origins, attempts)
            self._note(f"round {round}, attempt {attempts} was abandoned: {outcome.reason}")
            if self.coordinator.phase is Phase.FAILED:
                raise RunError(_gave_up(round, attempts, outcome.reason, parts))
            self.clock = self._next_attempt(len(parts))

    def _next_attempt(self, invited: int) -> float:
        """When to try again: after the pause or, if too few were there, when others may be."""
        later = self.clock + self.plan.schedule.pause
        if invited >= self.plan.schedule.fewest(len(self.data)):
            return later
        return max(later, self.devices.next_change(self.clock) or later)

    def _attempt(self, interruption: Interruption) -> _Attempt:
        """One attempt at a round: question after question, until it closes or is abandoned."""
        coordinator, driver = self.coordinator, self.driver
        received = driver.server.broadcast(coordinator.round - 1)
        self._load = Load(safetensors.size(flatten(received)), self._up)
        invitations = coordinator.open(self._roster(), self.clock)
        attempt = _Attempt(invitations, received)
        for each in invitations:
            attempt.parts[each.id] = Participant(each.client, Verdict.NOT_NEEDED, 0, 0)
        senders = {each.id: (each.client, each.turn) for each in invitations}
        if coordinator.phase not in (Phase.OPEN, Phase.HEARD):
            return attempt
        ask: Ask | None
        try:
            ask = driver.begin(
                coordinator.round, [*senders.values()], len(self.data), coordinator.attempt
            )
        except CannotClose as error:
            coordinator.abandon(str(error))
            return attempt
        asked = whom_of(ask, invitations)
        coordinator.need(ask.fewest, [each.id for each in asked])
        while ask is not None:
            self._exchange(attempt, ask, asked, interruption)
            if coordinator.phase is not Phase.HEARD:
                return attempt
            if ask.works:
                coordinator.worked()
            try:
                ask = driver.hear([senders[id] for id in coordinator.heard])
            except CannotClose as error:
                coordinator.abandon(str(error))
                return attempt
            if ask is not None:
                answered = [each for each in invitations if each.id in coordinator.heard]
                asked = whom_of(ask, answered)
                coordinator.ask(ask.fewest, [each.id for each in asked], self.clock)
        coordinator.finish()
        assert coordinator.outcome is not None
        attempt.close(coordinator.outcome.accepted)
        return attempt

    def _exchange(
        self,
        attempt: _Attempt,
        ask: Ask,
        asked: Sequence[Invitation],
        interruption: Interruption,
    ) -> None:
        """One question, until the coordinator has heard enough or is past its deadline."""
        coordinator, step = self.coordinator, self.coordinator.step
        told = with_question(attempt.received, ask)
        up = self._up if ask.works else schema_size(ask.schema)
        load = Load(sum(map(safetensors.size, _blobs(told))), up, ask.works)
        mail = {each.id: ask.mail.get((each.client, each.turn), {}) for each in asked}
        arrivals = self.timing.arrivals(
            asked, load, self.clock, coordinator.deadline, step,
            spare=len(asked) > coordinator.missing,
        )  # fmt: skip
        timely = [a for a in arrivals if a.time <= (coordinator.deadline or math.inf)]
        pending = deque(arrival.invitation for arrival in timely if not arrival.lost)
        results: dict[str, TaskResult] = {}
        seen: set[str] = set()

        def note(invitation: Invitation, outcome: str, up: int) -> None:
            own = mail[invitation.id]
            attempt.note(invitation, outcome, load.down + (safetensors.size(own) if own else 0), up)
            seen.add(invitation.id)

        for arrival in timely:
            if coordinator.phase is not Phase.OPEN:
                break
            if interruption.requested:
                raise Interrupted(len(self.run.history))
            self.clock = max(self.clock, arrival.time)
            invitation = arrival.invitation
            if arrival.lost:
                coordinator.lost(invitation.id, arrival.time)
                note(invitation, "lost", 0)
                continue
            if invitation.id not in results:
                # No more than the round still needs: so whatever is well-formed will be accepted,
                # and those that over-selection spares never run.
                group = [pending.popleft() for _ in range(min(coordinator.missing, len(pending)))]
                results |= self._results(attempt, ask, told, group, mail, interruption)
            result = results.pop(invitation.id)
            answer = coordinator.deliver(
                invitation.id, invitation.client, arrival.time, result.fault, step
            )
            if answer.accepted != (not result.fault):
                raise RunError("an answer was summed and not accepted: please report this")
            if not answer.accepted:
                self._note(f"round {invitation.round}: {answer.reason}")
            note(invitation, answer.verdict, result.size)
        if coordinator.phase is Phase.OPEN:
            assert coordinator.deadline is not None
            self.clock = coordinator.deadline
            coordinator.tick(self.clock)
        for arrival in arrivals:
            if arrival.invitation.id not in seen:
                note(arrival.invitation, *self._too_late(arrival, load))

    def _results(
        self,
        attempt: _Attempt,
        ask: Ask,
        told: Tree,
        group: Sequence[Invitation],
        mail: Mapping[str, Vectors],
        interruption: Interruption,
    ) -> dict[str, TaskResult]:
        """Have a group answer a question; what came of each, by invitation."""
        opened, blank = Received.of(self.plan, told), {}
        if group and (ask.works or ask.owner == "algorithm"):
            # Whoever comes for the first time begins from what it receives now, as a site would.
            blank = first_state(self.plan, opened, self.driver.server.blank)
        tasks = [
            self._task(each, blank, kept=attempt.kept.get(each.id), mail=mail[each.id])
            for each in group
        ]
        found: dict[str, TaskResult] = {}
        if not ask.works:
            for each, task in zip(group, tasks, strict=True):
                found[each.id] = self._answer(attempt, ask, opened, each, task)
            return found
        with contextlib.closing(self.backend.run(told, tasks, self.driver.sums)) as blocks:
            for block in blocks:
                for place, result in block:
                    invitation = group[place]
                    found[invitation.id] = result
                    state = dict(result.state)
                    attempt.kept[invitation.id] = state.pop("kept", {})
                    if not result.fault and state:
                        attempt.learned[invitation.member] = state
                if interruption.requested:
                    raise Interrupted(len(self.run.history))
        return found

    def _answer(
        self,
        attempt: _Attempt,
        ask: Ask,
        opened: Received,
        invitation: Invitation,
        task: ClientTask,
    ) -> TaskResult:
        """A client's answer to a question without work, taken in if it is well-formed."""
        examples = self.data.train(invitation.member)
        try:
            message, kept = answer_question(
                self.working, opened, ask.name, ask.owner, task, examples
            )
            validate(message, ask.schema)
        except UpdateRefused as refusal:
            return TaskResult(str(refusal), 0, {})
        attempt.kept[invitation.id] = kept
        self.driver.sums.add(message, task.sender)
        return TaskResult("", message_size(message), {})

    def _task(
        self,
        invitation: Invitation,
        blank: Tree,
        discount: float = 1.0,
        kept: Vectors | None = None,
        mail: Vectors | None = None,
    ) -> ClientTask:
        """A client's task, with what it `kept` of the round's questions so far and its mail."""
        member = invitation.member
        state = self._state(member, blank)
        row = (
            member, invitation.client, invitation.round, invitation.turn, invitation.fraction,
            discount, self.driver.coordinator.step,
        )  # fmt: skip
        return ClientTask.read(row, self.key, {**state, "kept": kept} if kept else state, mail)

    def _state(self, member: int, blank: Tree) -> Tree:
        """What a client keeps, or what it begins from."""
        return nest(self.states[member][1]) if member in self.states else blank

    def _too_late(self, arrival: Arrival, load: Load) -> tuple[str, int]:
        """A client whose answer no longer counts; its upload is cut off where it is."""
        if arrival.lost:
            return "lost", 0
        enough = self.coordinator.phase is Phase.HEARD
        late = not enough or self.clock == self.coordinator.deadline
        sending = load.up / arrival.conditions.up
        began = arrival.time - arrival.conditions.latency - sending
        share = min(max((self.clock - began) / sending, 0.0), 1.0) if sending > 0 else 0.0
        return str(Verdict.LATE if late else Verdict.NOT_NEEDED), int(share * load.up)

    def _roster(self) -> Roster:
        return Roster(
            self.data.names,
            self._sizes,
            self.devices.present(self.data.names, self.clock, self.key),
            self._resources,
            self._capacity if self.plan.schedule.adaptive else None,
        )

    def _capacity(self, member: int) -> float:
        coordinator = self.coordinator
        return self.timing.capacity(member, coordinator.round, coordinator.attempt, self._load)

    def _evaluate(self, round: int, *, last: bool) -> dict[str, float]:
        # No client is at work now: every core is free for this.
        learner = stacking(self.plan.learner)
        before = learner.use_threads(cores())
        try:
            return self._figures(round, last or round == self.plan.schedule.rounds)
        finally:
            learner.use_threads(before)

    def _figures(self, round: int, last: bool) -> dict[str, float]:
        evaluation = self.plan.evaluation
        metrics: dict[str, float] = {}
        # A model whose parts stay with its clients is theirs to judge.
        if self.plan.split.trivial and (last or round % evaluation.every == 0):
            metrics = evaluate_pooled(self.plan.learner, self.run.model, self.data)
        interval = evaluation.clients_every
        if interval is not None and (last or round % interval == 0):
            clients = self._each_client(round, spread_metrics(evaluation, self.data))
            metrics |= clients.spread()
            self.run.per_client = clients.by_name(self.data.names)
        return metrics

    def _each_client(self, round: int, names: tuple[str, ...]) -> ClientFigures:
        """Every client on its own test part, with the model that it would use itself."""
        plan, server = self.plan, self.driver.server
        if not has_own_models(plan):
            return evaluate_clients(plan.learner, self.run.model, self.data, names)
        received = Received.of(plan, server.broadcast(round))
        blank = first_state(plan, received, server.blank)

        def task_of(member: int) -> ClientTask:
            state = self._learned_now.get(member) or self._state(member, blank)
            return judged(member, self.data.names[member], round, self.key, state)

        return evaluate_own(plan, self.data, received, task_of, names)

    def _snapshot(self) -> Snapshot:
        """The state between two rounds; clients' states change only when the next one closes."""
        return Snapshot(
            len(self.run.history),
            self.driver.server.vectors(),
            self.states,
            self.driver.coordinator.state(),
            self.clock,
        )

    def _note(self, reason: str) -> None:
        if len(self.run.refusals) < REFUSALS_KEPT:
            self.run.refusals.append(reason)


def _attacked(plan: Plan, attackers: Attackers | None, data: FederatedData, key: Key) -> Plan:
    """The plan as clients follow it, some of whom attack."""
    if attackers is None:
        return plan
    if not isinstance(attackers, Attackers):
        raise ConfigurationError(f"attackers must be Attackers, not {attackers!r}")
    names = attackers.among(data.names, key)
    return replace(plan, algorithm=Attacked(plan.algorithm, attackers.attack, names))


def _blobs(told: Tree) -> list[Vectors]:
    """What a client fetches for a question: the model and what is told travel apart."""
    model = {name: part for name, part in told.items() if name != "question"}
    parts = [model, {name: part for name, part in told.items() if name == "question"}]
    return [flatten(part) for part in parts if part]


def _gave_up(round: int, attempts: int, reason: str, parts: Sequence[Participant]) -> str:
    refused = any(part.outcome == Verdict.MALFORMED for part in parts)
    advice = "; ask for fewer (minimum=...), invite more, or allow more time"
    if refused and "NaN" in reason:
        advice = ". NaN or infinite values mean that training diverges: try a smaller lr"
    elif refused:
        advice = ""
    return (
        f"round {round} was abandoned {attempts} times in a row, the last time because "
        f"{reason}{advice}"
    )
