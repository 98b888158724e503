"""Tracking: run folders, progress, plots and loggers."""

from atoll.tracking import loggers
from atoll.tracking.folder import RunFolder
from atoll.tracking.observer import Observer, RoundEnd, Snapshot
from atoll.tracking.progress import progress
from atoll.tracking.reading import find_runs, read_run
from atoll.tracking.record import Participant, Record, Run

__all__ = [
    "Observer",
    "Participant",
    "Record",
    "RoundEnd",
    "Run",
    "RunFolder",
    "Snapshot",
    "find_runs",
    "loggers",
    "progress",
    "read_run",
]
