"""The simulator: drives the coordinator with a virtual clock and runs the clients' turns."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from atoll.backends.backend import Backend, Engine, cores
from atoll.backends.stacks import Delivery, Turn
from atoll.core import safetensors
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Vector, Vectors
from atoll.data.federated import FederatedData
from atoll.errors import AtollError, ConfigurationError, DataError, RunError
from atoll.learners.base import stacking, steps_of
from atoll.rounds.buffered import coordinator_for
from atoll.rounds.client_states import ClientStates
from atoll.rounds.coordinator import Invitation, Phase, Verdict
from atoll.rounds.evaluate import (
    check_evaluation,
    evaluate_clients,
    evaluate_pooled,
    spread_metrics,
)
from atoll.rounds.messages import message_size
from atoll.rounds.plan import Plan
from atoll.rounds.roster import Roster
from atoll.rounds.server import Server
from atoll.rounds.task import first_state
from atoll.simulation.devices import Conditions, Devices, TracedDevices, device_key
from atoll.simulation.interrupt import Interrupted, Interruption
from atoll.tracking.observer import Observer, RoundEnd, Snapshot
from atoll.tracking.record import Participant, Record, Run

REFUSALS_KEPT = 1000
IDEAL = Conditions()


class _Arrival(NamedTuple):
    """When an invited client delivers, or when it is known to be lost."""

    time: float
    invitation: Invitation
    conditions: Conditions
    lost: bool
    #: Decides between arrivals of the same instant, fairly: no client is always the first.
    tie: bytes


@dataclass(frozen=True)
class _Gathered:
    """What a round's clients did: memories of the accepted, everyone's part, and how it went."""

    learned: dict[int, Vectors]
    participants: list[Participant]
    invited: int
    accepted: int
    attempts: int
    pulled: tuple[float, Vector] | None = None
    measurements: dict[str, float] = field(default_factory=dict)


class Simulator:
    """One simulated run of a plan over a population.

    The model's arithmetic is the engine's; here is everything around it, in virtual time. A turn
    is run only when its delivery can still count, so work that comes too late costs nothing real.
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
    ) -> None:
        if not isinstance(devices, Devices):
            raise ConfigurationError(f"devices must be Devices, not {devices!r}")
        if not isinstance(engine, Engine):
            raise ConfigurationError(
                f"engine must be 'auto', 'sequential', 'stacked' or one of atoll.simulation's "
                f"engines, not {engine!r}"
            )
        if not isinstance(run.seed, int):
            raise ConfigurationError(f"the seed must be a whole number, not {run.seed!r}")
        plan.learner.check(data)
        check_evaluation(plan.evaluation, data)
        plan.schedule.needed(len(data))
        self.plan, self.data, self.run = plan, data, run
        self.devices, self.engine, self.observers = devices, engine, observers
        self.key = Key(run.seed)
        self.server = Server(plan, self.key)
        self.coordinator = coordinator_for(plan.schedule, self.key)
        self.crew: Backend
        self.memories = ClientStates()
        self.clock = 0.0
        self._sizes = data.sizes()
        self._resources = devices.resources(data.names, self.key)
        self._blank = first_state(plan, self.server.broadcast())
        self._up_bytes, self._down = self._typical_size(), 0
        self._closed = self._snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same plan, data and seed."""
        self.server.restore(dict(snapshot.vectors))
        self.coordinator.restore(dict(snapshot.coordinator))
        self.memories.update(snapshot.memories)
        self.clock = snapshot.clock
        self._closed = snapshot

    def go(self) -> Run:
        """Run to the end; observers are told, and closed whatever happens."""
        self.run.model = self.server.model()
        try:
            for observer in self.observers:
                observer.begin(self.run)
            with (
                Interruption() as interruption,
                self.engine.open(self.plan, self.data, self.key) as self.crew,
            ):
                while self.coordinator.phase not in (Phase.DONE, Phase.FAILED):
                    self._round(interruption)
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
        return self.run

    def _round(self, interruption: Interruption) -> None:
        """What clients do until the round closes, then the step, the evaluation, the report."""
        started = time.perf_counter()
        round = self.coordinator.round
        gathered = self._gather(round, interruption)
        clients = time.perf_counter()
        participants = gathered.participants
        measurements = self.server.close(round, len(self.data), gathered.pulled)
        self.run.model = self.server.model()
        self.run.engine, self.run.engine_notes = str(self.crew.engine), self.crew.notes
        stepped = time.perf_counter()
        metrics = self._evaluate(round)
        evaluated = time.perf_counter()
        phases = {
            "clients": clients - started, "step": stepped - clients,
            "evaluation": evaluated - stepped,
        }  # fmt: skip
        record = Record(
            round,
            metrics,
            measurements | gathered.measurements,
            gathered.invited,
            gathered.accepted,
            gathered.attempts,
            sum(part.up for part in participants),
            sum(part.down for part in participants),
            self.clock,
        )
        seconds = time.perf_counter() - started
        self.run.seconds += seconds
        # Together, so that whatever stops the run finds all of a round or nothing of it.
        self.run.history.append(record)
        for member, memory in gathered.learned.items():
            self.memories[member] = (round, memory)
        self._closed = self._snapshot()
        end = RoundEnd(record, participants, self._closed, seconds, phases)
        for observer in self.observers:
            observer.round(self.run, end)
        if interruption.requested:
            raise Interrupted(round)

    def _gather(self, round: int, interruption: Interruption) -> _Gathered:
        """Attempts at the round until one closes."""
        participants: list[Participant] = []
        attempts = 0
        while True:
            learned, parts = self._attempt(interruption)
            participants += parts
            attempts += 1
            outcome = self.coordinator.outcome
            assert outcome is not None
            if outcome.closed:
                return _Gathered(learned, participants, len(parts), len(outcome.accepted), attempts)
            self._note(f"round {round}, attempt {attempts} was abandoned: {outcome.reason}")
            if self.coordinator.phase is Phase.FAILED:
                refused = any(part.outcome == Verdict.MALFORMED for part in parts)
                raise RunError(
                    f"round {round} was abandoned {attempts} times in a row, the last time because "
                    f"{outcome.reason}"
                    + (
                        ". NaN or infinite values mean that training diverges: try a smaller lr"
                        if refused
                        else "; ask for fewer (minimum=...), invite more, or allow more time"
                    )
                )
            self.clock = self._next_attempt(len(parts))

    def _next_attempt(self, invited: int) -> float:
        """When to try again: after the pause or, if too few were there, when others may be."""
        later = self.clock + self.plan.schedule.pause
        if invited >= self.plan.schedule.fewest(len(self.data)):
            return later
        return max(later, self.devices.next_change(self.clock) or later)

    def _attempt(self, interruption: Interruption) -> tuple[dict[int, Vectors], list[Participant]]:
        """One attempt at a round: memories of the accepted clients, and everyone's part in it."""
        coordinator = self.coordinator
        received = self.server.broadcast()
        self._down = down = safetensors.size(received)
        invitations = coordinator.open(self._roster(), self.clock)
        self.server.open()
        arrivals = self._arrivals(invitations, down)
        timely = [a for a in arrivals if a.time <= (coordinator.deadline or math.inf)]
        pending = deque(arrival.invitation for arrival in timely if not arrival.lost)
        results: dict[str, Delivery] = {}
        learned: dict[int, Vectors] = {}
        parts: dict[str, Participant] = {}
        for arrival in timely:
            if coordinator.phase is not Phase.OPEN:
                break
            if interruption.requested:
                raise Interrupted(len(self.run.history))
            self.clock = max(self.clock, arrival.time)
            invitation = arrival.invitation
            if arrival.lost:
                coordinator.lost(invitation.id, arrival.time)
                parts[invitation.id] = Participant(invitation.client, "lost", down, 0)
                continue
            if invitation.id not in results:
                # No more than the round still needs: so whatever is well-formed will be accepted,
                # and those that over-selection spares never run.
                group = [pending.popleft() for _ in range(min(coordinator.missing, len(pending)))]
                results |= self._results(received, group, interruption)
            delivery = results.pop(invitation.id)
            verdict = self._deliver(arrival, delivery)
            parts[invitation.id] = Participant(invitation.client, verdict, down, delivery.size)
            if not delivery.fault and delivery.memory:
                learned[invitation.member] = delivery.memory
        if coordinator.phase is Phase.OPEN:
            assert coordinator.deadline is not None
            self.clock = coordinator.deadline
            coordinator.tick(self.clock)
        for arrival in arrivals:
            if arrival.invitation.id not in parts:
                parts[arrival.invitation.id] = self._too_late(arrival, down)
        return learned, [parts[invitation.id] for invitation in invitations]

    def _deliver(self, arrival: _Arrival, delivery: Delivery) -> Verdict:
        """Hand in what is already in the sum, or the reason why it is not."""
        invitation = arrival.invitation
        answer = self.coordinator.deliver(
            invitation.id, invitation.client, arrival.time, delivery.fault
        )
        assert answer.accepted == (not delivery.fault), "the sum and the coordinator disagree"
        if not answer.accepted:
            self._note(f"round {invitation.round}: {answer.reason}")
        return answer.verdict

    def _results(
        self, received: Vectors, group: Sequence[Invitation], interruption: Interruption
    ) -> dict[str, Delivery]:
        """Run the turns of a group into the round's sum; what came of each, by invitation."""
        turns = [self._turn(invitation) for invitation in group]
        found: dict[str, Delivery] = {}
        with contextlib.closing(self.crew.run(received, turns, self.server.sums)) as blocks:
            for block in blocks:
                for place, delivery in block:
                    found[group[place].id] = delivery
                if interruption.requested:
                    raise Interrupted(len(self.run.history))
        return found

    def _turn(self, invitation: Invitation, discount: float = 1.0) -> Turn:
        member = invitation.member
        memory = self.memories[member][1] if member in self.memories else self._blank
        row = (
            member, invitation.client, invitation.round, invitation.turn, invitation.fraction,
            discount,
        )  # fmt: skip
        return Turn.read(row, self.key, memory)

    def _arrivals(self, invitations: Sequence[Invitation], down: int) -> list[_Arrival]:
        """Everyone's delivery in the order of time."""
        # Who comes first matters only where more are invited than needed.
        self._spare = len(invitations) > self.coordinator.missing
        if type(self.devices) is Devices and not self._spare:
            return [_Arrival(self.clock, each, IDEAL, False, b"") for each in invitations]
        arrivals = [self._arrival(invitation, down) for invitation in invitations]
        return sorted(arrivals, key=lambda arrival: (arrival.time, arrival.tie))

    def _arrival(self, invitation: Invitation, down: int) -> _Arrival:
        conditions = self._conditions(invitation.member, invitation.round, invitation.attempt)
        steps = steps_of(self._planned(invitation.member), invitation.fraction)
        took = conditions.transfer(down, self._up_bytes) + steps * conditions.seconds_per_step
        arrives = self.clock + took
        deadline = self.coordinator.deadline
        if deadline is not None and deadline < arrives <= deadline + 1e-9 * (1 + abs(deadline)):
            arrives = deadline  # late by rounding only
        tie = self.key.fold("tie", invitation.id).digest(8) if self._spare else b""
        if isinstance(self.devices, TracedDevices):
            leaves = self.devices.leaves(invitation.client, self.clock)
            if leaves is None or leaves < arrives:
                return _Arrival(leaves or self.clock, invitation, conditions, True, tie)
        return _Arrival(arrives, invitation, conditions, conditions.drops, tie)

    def _too_late(self, arrival: _Arrival, down: int) -> Participant:
        """A client whose delivery no longer counts; its upload is cut off where it is."""
        client = arrival.invitation.client
        if arrival.lost:
            return Participant(client, "lost", down, 0)
        assert self.coordinator.outcome is not None
        late = not self.coordinator.outcome.closed or self.clock == self.coordinator.deadline
        verdict = Verdict.LATE if late else Verdict.NOT_NEEDED
        sending = self._up_bytes / arrival.conditions.up
        began = arrival.time - arrival.conditions.latency - sending
        share = min(max((self.clock - began) / sending, 0.0), 1.0) if sending > 0 else 0.0
        return Participant(client, str(verdict), down, int(share * self._up_bytes))

    def _roster(self) -> Roster:
        return Roster(
            self.data.names,
            self._sizes,
            self.devices.present(self.data.names, self.clock, self.key),
            self._resources,
            self._capacity if self.plan.schedule.adaptive else None,
        )

    def _capacity(self, member: int) -> float:
        """The share of its work that a client can do and deliver by the deadline: whole steps."""
        assert self.plan.schedule.deadline is not None
        planned = self._planned(member)
        conditions = self._conditions(member, self.coordinator.round, self.coordinator.attempt)
        left = self.plan.schedule.deadline - conditions.transfer(self._down, self._up_bytes)
        if conditions.seconds_per_step <= 0:
            return 1.0
        # A hair of slack: a time that was computed from steps must give those steps back.
        steps = math.floor(left / conditions.seconds_per_step * (1 + 1e-9))
        return min(max(steps, 1), planned) / planned

    def _conditions(self, member: int, round: int, attempt: int) -> Conditions:
        name = self.data.names[member]
        own = device_key(self.key, name)
        return self.devices.conditions(name, self._planned(member), own, own.fold(round, attempt))

    def _planned(self, member: int) -> int:
        return self.plan.learner.planned_steps(int(self._sizes[member]))

    def _evaluate(self, round: int) -> dict[str, float]:
        # No client is at work now: every core is free for this.
        before = stacking(self.plan.learner).use_threads(cores())
        try:
            return self._figures(round)
        finally:
            stacking(self.plan.learner).use_threads(before)

    def _figures(self, round: int) -> dict[str, float]:
        evaluation, last = self.plan.evaluation, round == self.plan.schedule.rounds
        metrics: dict[str, float] = {}
        if last or round % evaluation.every == 0:
            metrics = evaluate_pooled(self.plan.learner, self.run.model, self.data)
        interval = evaluation.clients_every
        if interval is not None and (last or round % interval == 0):
            names = spread_metrics(evaluation, self.data)
            clients = evaluate_clients(self.plan.learner, self.run.model, self.data, names)
            metrics |= clients.spread()
            self.run.per_client = clients.by_name(self.data.names)
        return metrics

    def _typical_size(self) -> int:
        """Bytes of an update as the schema promises it; stages may make it smaller."""
        schema = self.plan.schema
        update = Update(
            {name: np.zeros(size, np.float32) for name, size in schema.vectors.items()},
            statistics={n: np.zeros(s, schema.dtype(n)) for n, s in schema.statistics.items()},
        )
        encoded, _ = self.plan.stages.encode(
            update,
            self.plan.stages.broadcast(self.server.stages),
            self.plan.stages.remember(schema),
            self.key,
        )
        return message_size(encoded)

    def _snapshot(self) -> Snapshot:
        """The state between two rounds; memories change only when the next one closes."""
        return Snapshot(
            len(self.run.history),
            self.server.vectors(),
            self.memories,
            self.coordinator.state(),
            self.clock,
        )

    def _note(self, reason: str) -> None:
        if len(self.run.refusals) < REFUSALS_KEPT:
            self.run.refusals.append(reason)


def check_population(data: object) -> FederatedData:
    """The data as a population, or a sentence about what they are instead."""
    if isinstance(data, FederatedData):
        return data
    raise DataError(
        f"clients must be FederatedData, not {type(data).__name__}; partition a set first, "
        "e.g. data.load('digits').dirichlet(clients=100, alpha=0.3)"
    )
