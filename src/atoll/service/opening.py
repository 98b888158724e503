"""Opening: what the next round, or a free place in an asynchronous schedule, still waits for."""

from __future__ import annotations

from atoll.rounds.roster import Roster
from atoll.rounds.schedules import Buffered, Schedule
from atoll.service.members import Members


def first_waits_for(schedule: Schedule, wanted: int | None, members: Members) -> str:
    """Why the first round cannot begin: those who are to be there have not joined; or empty."""
    if wanted is None:
        if isinstance(schedule, Buffered):
            wanted = schedule.concurrency
        elif schedule.cohort is not None:
            wanted = schedule.invite or schedule.cohort
    have = len(members.names)
    if wanted is not None:
        return "" if have >= wanted else f"the first round: {have} of {wanted} sites have joined"
    awaited = members.awaited()
    return f"the first round: {', '.join(awaited)} can still join" if awaited else ""


def next_waits_for(schedule: Schedule, roster: Roster, *, patient: bool) -> str:
    """Why nobody can be invited now; or empty. The `patient` wait for all that are to be asked."""
    population, present = len(roster), len(roster.candidates())
    if isinstance(schedule, Buffered):
        least, enough = schedule.concurrency, 1
    else:
        least = max(schedule.cohort or 1, schedule.minimum or 1)
        enough = least
    if population < least:
        return f"more sites: the schedule needs {least}, and {population} are part of this"
    if not isinstance(schedule, Buffered):
        enough = max(schedule.fewest(population), 1)
        enough = schedule.invited(population) if patient else enough
    if present < enough:
        return f"sites to be heard of: {present} of the {enough} that are needed were, lately"
    return ""
