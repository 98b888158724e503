"""Rounds: selection, schedules and the coordinator, without clocks, sockets or threads."""

from atoll.rounds import schedules
from atoll.rounds.coordinator import Answer, Coordinator, Invitation, Outcome, Phase, Verdict
from atoll.rounds.plan import Evaluation, Plan
from atoll.rounds.roster import Resources, Roster
from atoll.rounds.server import Server
from atoll.rounds.task import run_task

__all__ = [
    "Answer",
    "Coordinator",
    "Evaluation",
    "Invitation",
    "Outcome",
    "Phase",
    "Plan",
    "Resources",
    "Roster",
    "Server",
    "Verdict",
    "schedules",
    "run_task",
]
