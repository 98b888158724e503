"""Timing: when an invited client's answer arrives in virtual time, and how much it can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.learners.base import steps_of
from atoll.rounds.coordinator import Invitation
from atoll.rounds.plan import Plan
from atoll.simulation.devices import Conditions, Devices, TracedDevices, device_key

IDEAL = Conditions()


class Arrival(NamedTuple):
    """When a client that was asked answers, or when it is known to be lost."""

    time: float
    invitation: Invitation
    conditions: Conditions
    lost: bool
    #: Decides between arrivals of the same instant, fairly: no client is always the first.
    tie: bytes


class Load(NamedTuple):
    """What a question costs: bytes down and up, and whether there is local work to do."""

    down: int
    up: int
    works: bool = True


class Timing:
    """The devices of a population, as far as time goes."""

    def __init__(
        self, plan: Plan, names: Sequence[str], sizes: NDArray[np.int64], devices: Devices, key: Key
    ) -> None:
        self._plan, self._names, self._sizes = plan, names, sizes
        self._devices, self._key = devices, key

    def arrivals(
        self,
        asked: Sequence[Invitation],
        load: Load,
        now: float,
        deadline: float | None,
        step: int,
        *,
        spare: bool,
    ) -> list[Arrival]:
        """Everyone's answer in the order of time; `spare` if not all of them are needed."""
        if type(self._devices) is Devices and not spare:
            return [Arrival(now, each, IDEAL, False, b"") for each in asked]
        found = [self.arrival(each, load, now, deadline, step, spare=spare) for each in asked]
        return sorted(found, key=lambda arrival: (arrival.time, arrival.tie))

    def arrival(
        self,
        invitation: Invitation,
        load: Load,
        now: float,
        deadline: float | None,
        step: int = 0,
        *,
        spare: bool = True,
    ) -> Arrival:
        """One client's answer to a question that is put now."""
        conditions = self.conditions(invitation.member, invitation.round, invitation.attempt, step)
        took = conditions.transfer(load.down, load.up)
        if load.works:
            steps = steps_of(self.planned(invitation.member), invitation.fraction)
            took += steps * conditions.seconds_per_step
        arrives = now + took
        if deadline is not None and deadline < arrives <= deadline + 1e-9 * (1 + abs(deadline)):
            arrives = deadline  # late by rounding only
        # Who comes first matters only where more are asked than needed.
        tie = self._key.fold("tie", invitation.id).digest(8) if spare else b""
        if isinstance(self._devices, TracedDevices):
            leaves = self._devices.leaves(invitation.client, now)
            if leaves is None or leaves < arrives:
                return Arrival(leaves or now, invitation, conditions, True, tie)
        return Arrival(arrives, invitation, conditions, conditions.drops, tie)

    def capacity(self, member: int, round: int, attempt: int, load: Load) -> float:
        """The share of its work that a client can do and deliver by the deadline: whole steps."""
        deadline = self._plan.schedule.deadline
        assert deadline is not None
        planned = self.planned(member)
        conditions = self.conditions(member, round, attempt)
        left = deadline - conditions.transfer(load.down, load.up)
        if conditions.seconds_per_step <= 0:
            return 1.0
        # A hair of slack: a time that was computed from steps must give those steps back.
        steps = math.floor(left / conditions.seconds_per_step * (1 + 1e-9))
        return min(max(steps, 1), planned) / planned

    def conditions(self, member: int, round: int, attempt: int, step: int = 0) -> Conditions:
        """The conditions of one client for one question."""
        name = self._names[member]
        own = device_key(self._key, name)
        today = own.fold(round, attempt, step) if step else own.fold(round, attempt)
        return self._devices.conditions(name, self.planned(member), own, today)

    def planned(self, member: int) -> int:
        """Local steps of a client's full work, all passes of the algorithm together."""
        steps = self._plan.learner.planned_steps(int(self._sizes[member]))
        return math.ceil(steps * self._plan.algorithm.passes)
