"""The simulator of asynchronous schedules: clients come and go while the model moves on."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atoll.backends.stacks import Delivery, Turn
from atoll.core import safetensors
from atoll.core.vectors import Vectors, part, prefixed
from atoll.errors import RunError
from atoll.rounds.buffered import BufferedCoordinator
from atoll.rounds.coordinator import Invitation, Verdict
from atoll.rounds.schedules import Buffered
from atoll.simulation.interrupt import Interrupted, Interruption
from atoll.simulation.simulator import Simulator, _Arrival, _Gathered
from atoll.tracking.observer import Snapshot
from atoll.tracking.record import Participant

RECEIVED = "received/"


@dataclass
class _Walk:
    """Deliveries in the order of time, up to the one that fills the buffer."""

    accepted: list[tuple[Invitation, int]] = field(default_factory=list)
    participants: list[Participant] = field(default_factory=list)
    invited: int = 0


class AsynchronousSimulator(Simulator):
    """One simulated run of a plan whose schedule is `Buffered`.

    `_flights` are the turns that are going on, `_received` what members of each version that is
    still at work were given.
    """

    coordinator: BufferedCoordinator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._flights: list[tuple[float, bytes, str, _Arrival]] = []
        self._began: dict[str, tuple[Invitation, float]] = {}
        self._received: dict[int, Vectors] = {}
        self._learned: dict[int, Vectors] = {}
        super().__init__(*args, **kwargs)

    def restore(self, snapshot: Snapshot) -> None:
        vectors = dict(snapshot.vectors)
        kept = {n: vectors.pop(n) for n in list(vectors) if n.startswith(RECEIVED)}
        super().restore(
            Snapshot(
                snapshot.round, vectors, snapshot.memories, snapshot.coordinator, snapshot.clock
            )
        )
        self._closed = snapshot
        for version in {int(name.split("/")[1]) for name in kept}:
            self._received[version] = part(f"{RECEIVED}{version}/", kept)
        for row, began in snapshot.coordinator["flights"]:
            invitation = Invitation(*row)
            self.clock = began
            self._down = safetensors.size(self._received[invitation.round - 1])
            self._take_off(invitation)
        self.clock = snapshot.clock

    def _gather(self, round: int, interruption: Interruption) -> _Gathered:
        """Deliveries until the buffer is full.

        Which turns those are follows from times alone, unless an update is faulty. So all are
        walked through first, then run, several at once; where a fault shows, the walk is repeated
        with what is known.
        """
        self.server.open()
        results: dict[str, Delivery] = {}
        self._learned = {}
        while True:
            before = self.coordinator.state(), list(self._flights), dict(self._began), self.clock
            walk = self._walk(results, interruption)
            fresh = [item for item in walk.accepted if item[0].id not in results]
            for group in _apart(fresh):
                self._run(group, results, interruption)
            if not any(results[invitation.id].fault for invitation, _ in fresh):
                break
            faults = [each.fault for each in results.values() if each.fault]
            if len(faults) > self._schedule.most_faults:
                raise RunError(
                    f"{len(faults)} updates of round {round} were refused, the first because "
                    f"{faults[0]}; NaN or infinite values mean that training diverges: try a "
                    "smaller lr"
                )
            state, self._flights, self._began, self.clock = before
            self.coordinator.restore(state)
        pulled = None
        if self._schedule.pull:
            ((invitation, staleness),) = walk.accepted
            began = self._received[invitation.round - 1]["params"]
            pulled = self._schedule.staleness.discount(staleness), began
        ages = [stale for _, stale in walk.accepted]
        figures = {"staleness": float(np.mean(ages)), "most_stale": float(max(ages))}
        self._forget()
        # Sizes are known only now.
        names = {invitation.id: invitation.client for invitation, _ in walk.accepted}
        parts = [
            Participant(names[p.client], p.outcome, p.down, results[p.client].size)
            if p.client in names
            else p
            for p in walk.participants
        ]
        return _Gathered(self._learned, parts, walk.invited, len(walk.accepted), 1, pulled, figures)

    @property
    def _schedule(self) -> Buffered:
        assert isinstance(self.plan.schedule, Buffered)
        return self.plan.schedule

    def _walk(self, results: dict[str, Delivery], interruption: Interruption) -> _Walk:
        """Events in the order of time until a step is due; updates not yet run count as good."""
        walk = _Walk()
        while True:
            if interruption.requested:
                raise Interrupted(len(self.run.history))
            walk.invited += self._invite()
            if not self._flights:
                self._wait()
                continue
            at, _, _, arrival = heapq.heappop(self._flights)
            self.clock = max(self.clock, at)
            invitation = arrival.invitation
            del self._began[invitation.id]
            if arrival.lost:
                self.coordinator.lost(invitation.id, self.clock)
                walk.participants.append(Participant(invitation.client, "lost", self._down, 0))
                continue
            known = results.get(invitation.id)
            fault = known.fault if known else ""
            answer = self.coordinator.deliver(invitation.id, invitation.client, self.clock, fault)
            if answer.accepted:
                walk.accepted.append((invitation, answer.staleness))
                # By invitation for now: its size is not known before it has run.
                walk.participants.append(
                    Participant(invitation.id, Verdict.ACCEPTED, self._down, 0)
                )
            else:
                size = known.size if known else self._up_bytes
                walk.participants.append(
                    Participant(invitation.client, answer.verdict, self._down, size)
                )
                if known is None or known.fault:
                    self._note(f"round {self.coordinator.round}: {answer.reason}")
            if self.coordinator.outcome is not None:
                return walk

    def _invite(self) -> int:
        """Fill the free places; how many were invited."""
        coordinator, invited = self.coordinator, 0
        while coordinator.ready:
            invitations = coordinator.open(self._roster(), self.clock)
            if not invitations:
                break
            version = coordinator.round - 1
            if version not in self._received:
                self._received[version] = self.server.broadcast()
            self._down = safetensors.size(self._received[version])
            for invitation in invitations:
                self._take_off(invitation)
            invited += len(invitations)
        return invited

    def _take_off(self, invitation: Invitation) -> None:
        self._spare = True
        arrival = self._arrival(invitation, self._down)
        self._began[invitation.id] = invitation, self.clock
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
        results: dict[str, Delivery],
        interruption: Interruption,
    ) -> None:
        """Run these turns into the buffer, those of one version at a time."""
        for version in sorted({invitation.round for invitation, _ in group}):
            own = [item for item in group if item[0].round == version]
            turns = [
                self._turn(invitation, self._schedule.staleness.discount(stale))
                for invitation, stale in own
            ]
            received = self._received[version - 1]
            with contextlib.closing(self.crew.run(received, turns, self.server.sums)) as blocks:
                for block in blocks:
                    for place, delivery in block:
                        results[own[place][0].id] = delivery
                    if interruption.requested:
                        raise Interrupted(len(self.run.history))
        for invitation, _ in group:
            delivery = results[invitation.id]
            if not delivery.fault and delivery.memory:
                self._learned[invitation.member] = delivery.memory

    def _turn(self, invitation: Invitation, discount: float = 1.0) -> Turn:
        turn = super()._turn(invitation, discount)
        # An accepted update is never dropped here, so what its client learned holds at once.
        learned = self._learned.get(invitation.member)
        return turn if learned is None else turn._replace(memory=learned)

    def _forget(self) -> None:
        """Drop versions that nobody is at work on."""
        needed = {invitation.round - 1 for invitation, _ in self._began.values()}
        self._received = {v: r for v, r in self._received.items() if v in needed}

    def _snapshot(self) -> Snapshot:
        plain = super()._snapshot()
        flights = [
            [[i.id, i.member, i.client, i.round, i.attempt, i.fraction, i.turn], began]
            for i, began in self._began.values()
        ]
        vectors = dict(plain.vectors)
        for version, received in self._received.items():
            vectors |= prefixed(f"{RECEIVED}{version}/", received)
        coordinator = {**plain.coordinator, "flights": flights}
        return Snapshot(plain.round, vectors, plain.memories, coordinator, plain.clock)


def _apart(
    turns: Sequence[tuple[Invitation, int]],
) -> Iterator[list[tuple[Invitation, int]]]:
    """The turns in order, in groups in which no client comes twice: it must remember the first."""
    group: list[tuple[Invitation, int]] = []
    for item in turns:
        if any(item[0].client == other.client for other, _ in group):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
