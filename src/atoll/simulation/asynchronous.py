"""The simulator of asynchronous schedules: clients come and go while the model moves on."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from atoll.core import safetensors
from atoll.core.vectors import Tree, Vector, flatten, nest
from atoll.errors import RunError
from atoll.rounds.buffered import BufferedCoordinator
from atoll.rounds.coordinator import Invitation, Verdict
from atoll.rounds.task import Received, TaskResult, first_state
from atoll.simulation.interrupt import Interrupted, Interruption
from atoll.simulation.simulator import Gathered, Simulator
from atoll.simulation.timing import Arrival, Load
from atoll.tracking.observer import Snapshot
from atoll.tracking.record import Participant

RECEIVED = "received"
#: So many invitations in a row that come to nothing mean that nothing will come.
FRUITLESS = 10_000


@dataclass
class _Walk:
    """Deliveries in the order of time, up to the one that fills the buffer."""

    accepted: list[tuple[Invitation, int]] = field(default_factory=list)
    participants: list[Participant] = field(default_factory=list)
    invited: int = 0


class AsynchronousSimulator(Simulator):
    """One simulated run of a plan whose schedule is `Buffered`.

    `_flights` are the tasks that are going on, `_received` what members of each version that is
    still at work were given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._flights: list[tuple[float, bytes, str, Arrival]] = []
        self._at_work: dict[str, tuple[Invitation, float]] = {}
        self._received: dict[int, Tree] = {}
        self._learned: dict[int, Tree] = {}
        super().__init__(*args, **kwargs)

    @property
    def buffered(self) -> BufferedCoordinator:
        """The state machine of the schedule."""
        assert isinstance(self.driver.coordinator, BufferedCoordinator)
        return self.driver.coordinator

    def restore(self, snapshot: Snapshot) -> None:
        tree = nest(snapshot.vectors)
        received = tree.pop(RECEIVED, {})
        super().restore(replace(snapshot, vectors=flatten(tree)))
        self._closed = snapshot
        self._received = {int(version): told for version, told in received.items()}
        for row, began in snapshot.coordinator["flights"]:
            invitation = Invitation(*row)
            self.clock = began
            self._weigh(self._received[invitation.round - 1])
            self._take_off(invitation)
        self.clock = snapshot.clock

    def _gather(self, round: int, interruption: Interruption) -> Gathered:
        """Deliveries until the buffer is full.

        Which tasks those are follows from times alone, unless an update is faulty. So all are
        walked through first, then run, several at once; where a fault shows, the walk is repeated
        with what is known.
        """
        self.driver.begin(round, (), len(self.data))
        results: dict[str, TaskResult] = {}
        self._learned = {}
        while True:
            before = self.buffered.state(), list(self._flights), dict(self._at_work), self.clock
            walk = self._walk(results, interruption)
            fresh = [item for item in walk.accepted if item[0].id not in results]
            for group in _apart(fresh):
                self._run(group, results, interruption)
            if not any(results[invitation.id].fault for invitation, _ in fresh):
                break
            faults = [each.fault for each in results.values() if each.fault]
            most = self.plan.schedule.most_faults
            if most is not None and len(faults) > most:
                raise RunError(
                    f"{len(faults)} updates of round {round} were refused, the first because "
                    f"{faults[0]}; NaN or infinite values mean that training diverges: try a "
                    "smaller lr"
                )
            state, self._flights, self._at_work, self.clock = before
            self.buffered.restore(state)
        self.driver.hear([(i.client, i.turn) for i, _ in walk.accepted])
        # Sizes are known only now.
        names = {invitation.id: invitation.client for invitation, _ in walk.accepted}
        parts = [
            Participant(names[p.client], p.outcome, p.down, results[p.client].size)
            if p.client in names
            else p
            for p in walk.participants
        ]
        origins = [(invitation.round - 1, stale) for invitation, stale in walk.accepted]
        return Gathered(self._learned, parts, walk.invited, origins, 1)

    def _began(self, version: int) -> Vector:
        params: Vector = Received.of(self.plan, self._received[version]).algorithm["params"]
        return params

    def _round(self, interruption: Interruption) -> None:
        super()._round(interruption)
        self._forget()

    def _walk(self, results: dict[str, TaskResult], interruption: Interruption) -> _Walk:
        """Events in the order of time until a step is due; updates not yet run count as good."""
        walk, fruitless = _Walk(), 0
        while True:
            if fruitless > FRUITLESS:
                raise RunError(
                    f"round {self.buffered.round}: {fruitless} times in a row nobody could be "
                    "invited or the client delivered nothing, up to "
                    f"{self.clock:.0f} s of simulated time; give devices that drop out less, are "
                    "there more often, or stay for longer than their work takes"
                )
            if interruption.requested:
                raise Interrupted(len(self.run.history))
            walk.invited += self._invite()
            if not self._flights:
                self._wait()
                fruitless += 1
                continue
            at, _, _, arrival = heapq.heappop(self._flights)
            self.clock = max(self.clock, at)
            invitation = arrival.invitation
            del self._at_work[invitation.id]
            if arrival.lost:
                self.buffered.lost(invitation.id, self.clock)
                walk.participants.append(Participant(invitation.client, "lost", self._load.down, 0))
                fruitless += 1
                continue
            known = results.get(invitation.id)
            fault = known.fault if known else ""
            answer = self.buffered.deliver(invitation.id, invitation.client, self.clock, fault)
            fruitless = 0 if answer.accepted else fruitless + 1
            if answer.accepted:
                walk.accepted.append((invitation, answer.staleness))
                # By invitation for now: its size is not known before it has run.
                walk.participants.append(
                    Participant(invitation.id, Verdict.ACCEPTED, self._load.down, 0)
                )
            else:
                size = known.size if known else self._up
                walk.participants.append(
                    Participant(invitation.client, answer.verdict, self._load.down, size)
                )
                if known is None or known.fault:
                    self._note(f"round {self.buffered.round}: {answer.reason}")
            if self.buffered.outcome is not None:
                return walk

    def _invite(self) -> int:
        """Fill the free places; how many were invited."""
        coordinator, invited = self.buffered, 0
        while coordinator.ready:
            invitations = coordinator.open(self._roster(), self.clock)
            if not invitations:
                break
            version = coordinator.round - 1
            if version not in self._received:
                self._received[version] = self.driver.server.broadcast(version)
            self._weigh(self._received[version])
            for invitation in invitations:
                self._take_off(invitation)
            invited += len(invitations)
        return invited

    def _take_off(self, invitation: Invitation) -> None:
        arrival = self.timing.arrival(invitation, self._load, self.clock, None)
        self._at_work[invitation.id] = invitation, self.clock
        heapq.heappush(self._flights, (arrival.time, arrival.tie, invitation.id, arrival))

    def _wait(self) -> None:
        """Nobody is at work, and nobody can be asked: others may come later."""
        later = self.devices.next_change(self.clock)
        if later is None or later <= self.clock:
            raise RunError(
                f"no client is there at time {self.clock:.0f} s and none will come; give devices "
                "that are available"
            )
        self.clock = later

    def _run(
        self,
        group: Sequence[tuple[Invitation, int]],
        results: dict[str, TaskResult],
        interruption: Interruption,
    ) -> None:
        """Run these tasks into the buffer, those of one version at a time."""
        for version in sorted({invitation.round for invitation, _ in group}):
            own = [item for item in group if item[0].round == version]
            received = self._received[version - 1]
            blank = first_state(
                self.plan, Received.of(self.plan, received), self.driver.server.blank
            )
            tasks = [
                self._task(invitation, blank, self.plan.schedule.discount(stale))
                for invitation, stale in own
            ]
            with contextlib.closing(self.backend.run(received, tasks, self.driver.sums)) as blocks:
                for block in blocks:
                    for place, result in block:
                        results[own[place][0].id] = result
                    if interruption.requested:
                        raise Interrupted(len(self.run.history))
        for invitation, _ in group:
            result = results[invitation.id]
            if not result.fault and result.state:
                self._learned[invitation.member] = result.state

    def _state(self, member: int, blank: Tree) -> Tree:
        # An accepted update is never dropped here, so what its client learned holds at once.
        return self._learned.get(member) or super()._state(member, blank)

    def _weigh(self, received: Tree) -> None:
        self._load = Load(safetensors.size(flatten(received)), self._up)

    def _forget(self) -> None:
        """Drop versions that nobody is at work on."""
        needed = {invitation.round - 1 for invitation, _ in self._at_work.values()}
        self._received = {v: r for v, r in self._received.items() if v in needed}

    def _snapshot(self) -> Snapshot:
        plain = super()._snapshot()
        flights = [
            [[i.id, i.member, i.client, i.round, i.attempt, i.fraction, i.turn], began]
            for i, began in self._at_work.values()
        ]
        needed = {invitation.round - 1 for invitation, _ in self._at_work.values()}
        kept = {str(v): told for v, told in self._received.items() if v in needed}
        vectors = {**plain.vectors, **flatten({RECEIVED: kept})}
        return replace(
            plain, vectors=vectors, coordinator={**plain.coordinator, "flights": flights}
        )


def _apart(
    tasks: Sequence[tuple[Invitation, int]],
) -> Iterator[list[tuple[Invitation, int]]]:
    """The tasks in order, in groups in which no client comes twice: it must remember the first."""
    group: list[tuple[Invitation, int]] = []
    for item in tasks:
        if any(item[0].client == other.client for other, _ in group):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
