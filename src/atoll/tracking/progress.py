"""Progress: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib
import sys
import time
from html import escape
from typing import Any, TextIO

from atoll.learners.metrics import main_metric
from atoll.tracking.observer import Observer, RoundEnd, Snapshot
from atoll.tracking.record import Record, Run, human_bytes, human_seconds


def progress(stream: TextIO | None = None) -> Observer:
    """The progress that fits where this runs: a notebook, a terminal, or a plain stream."""
    if stream is None and in_notebook():
        return NotebookProgress()
    stream = stream or sys.stderr
    return LiveProgress(stream) if stream.isatty() else PlainProgress(stream)


def in_notebook() -> bool:
    """Whether there is a notebook that shows what is displayed."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class PlainProgress(Observer):
    """One line per round, at most one every `seconds`, and always the first and the last."""

    def __init__(self, stream: TextIO, seconds: float = 2.0) -> None:
        self.stream, self.seconds = stream, seconds
        self._last = 0.0

    def begin(self, run: Run) -> None:
        self._started, self._before = time.perf_counter(), len(run.history)
        if run.history:
            self._print(f"resuming after round {len(run.history)} of {run.rounds}")

    def round(self, run: Run, end: RoundEnd) -> None:
        now = time.perf_counter()
        last = end.record.round == run.rounds
        if last or end.record.round == self._before + 1 or now - self._last >= self.seconds:
            self._last = now
            left = _time_left(run, now - self._started, self._before)
            self._print(
                f"round {end.record.round}/{run.rounds}  {_figures(run, end.record)}  {left}"
            )

    def interrupted(self, run: Run, snapshot: Snapshot) -> None:
        self._print(f"stopped after round {snapshot.round} of {run.rounds}")

    def _print(self, text: str) -> None:
        print(text.rstrip(), file=self.stream, flush=True)


class LiveProgress(Observer):
    """A bar with round, loss, accuracy, bytes and time left, redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=Console(file=stream),
            refresh_per_second=8,
        )

    def begin(self, run: Run) -> None:
        self._started, self._before = time.perf_counter(), len(run.history)
        self._task = self._bar.add_task("starting", total=run.rounds, completed=len(run.history))
        self._bar.start()

    def round(self, run: Run, end: RoundEnd) -> None:
        left = _time_left(run, time.perf_counter() - self._started, self._before)
        text = f"{_figures(run, end.record)}  {left}"
        self._bar.update(self._task, completed=end.record.round, description=text)

    def close(self) -> None:
        self._bar.stop()


class NotebookProgress(Observer):
    """A bar in the output of a notebook's cell, redrawn in place."""

    def begin(self, run: Run) -> None:
        show: Any = importlib.import_module("IPython.display").display
        self._started, self._before = time.perf_counter(), len(run.history)
        self._drawn = 0.0
        self._shown = show(self._bar(run, "starting"), display_id=True)

    def round(self, run: Run, end: RoundEnd) -> None:
        now = time.perf_counter()
        if now - self._drawn >= 0.1 or end.record.round == run.rounds:
            self._drawn = now
            left = _time_left(run, now - self._started, self._before)
            self._shown.update(self._bar(run, f"{_figures(run, end.record)}  {left}"))

    def interrupted(self, run: Run, snapshot: Snapshot) -> None:
        self._shown.update(self._bar(run, f"stopped after round {snapshot.round}"))

    def _bar(self, run: Run, text: str) -> Any:
        made: Any = importlib.import_module("IPython.display").HTML
        done = len(run.history)
        bar = f"<progress value='{done}' max='{max(run.rounds, 1)}'></progress>"
        return made(f"<div>round {done}/{run.rounds} {bar} {escape(text)}</div>")


def _figures(run: Run, record: Record) -> str:
    metrics = record.metrics or run.metrics
    names = dict.fromkeys(("loss", main_metric(metrics)))
    parts = [f"{name} {metrics[name]:.4f}" for name in names if name in metrics]
    if not parts and "train_loss" in record.measurements:
        parts = [f"train loss {record.measurements['train_loss']:.4f}"]
    parts.append(f"{human_bytes(run.bytes_up)} up")
    if record.accepted < record.invited:
        parts.append(f"{record.accepted} of {record.invited} delivered")
    return "  ".join(parts)


def _time_left(run: Run, seconds: float, before: int) -> str:
    done = len(run.history) - before
    if len(run.history) >= run.rounds:
        return f"done in {human_seconds(seconds)}"
    return f"{human_seconds(seconds / done * (run.rounds - len(run.history)))} left"
