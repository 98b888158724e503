"""Rounds: selection, schedules, the coordinator and the driver, without clocks or sockets."""

from atoll.rounds import schedules, stopping
from atoll.rounds.coordinator import Answer, Coordinator, Invitation, Outcome, Phase, Verdict
from atoll.rounds.driver import Driver
from atoll.rounds.plan import Evaluation, Plan
from atoll.rounds.roster import Resources, Roster
from atoll.rounds.server import Server
from atoll.rounds.task import run_task

__all__ = [
    "Answer",
    "Coordinator",
    "Driver",
    "Evaluation",
    "Invitation",
    "Outcome",
    "Phase",
    "Plan",
    "Resources",
    "Roster",
    "Server",
    "Verdict",
    "run_task",
    "schedules",
    "stopping",
]
