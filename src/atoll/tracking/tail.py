"""Following a run folder: its rounds are read once, and then only what was added."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import CheckpointError
from atoll.tracking.record import Closed, Participant, Record

LINES = ("rounds.jsonl", "ledger.jsonl", "timings.jsonl", "refusals.jsonl")


class Tail:
    """A file of JSON lines that grows; iterating gives what was added since the last time.

    A last line that is not whole, because it is being written or a crash cut it off, is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = self._number = self._file = 0

    @property
    def rewritten(self) -> bool:
        """Whether what was read is no longer what is there, as when a run is resumed."""
        if self._at == 0:
            return False
        try:
            found = self.path.stat()
        except OSError:
            return True
        return found.st_size < self._at or found.st_ino != self._file

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each complete new line."""
        return (line for _, line in self.placed())

    def placed(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The same, with the place in the file."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            self._file = os.fstat(file.fileno()).st_ino
            file.seek(self._at)
            for text in file:
                line = _line(text)
                if line is None:
                    if text.endswith(b"\n") and file.read(1):
                        raise CheckpointError(f"{self.path} is damaged at line {self._number + 1}")
                    return
                place, self._at, self._number = self._at, self._at + len(text), self._number + 1
                yield place, line


class RunTail:
    """The closed rounds of a run folder, and what went wrong, followed while they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Why updates were refused and attempts abandoned so far, each with its round.
        self.refusals: list[tuple[int, str]] = []
        self._tails = {name: Tail(folder / name) for name in LINES}
        self._untold: deque[Record] = deque()
        self._timings: dict[int, dict[str, Any]] = {}
        self._places: dict[int, int] = {}

    @property
    def rewritten(self) -> bool:
        """Whether what was read is no longer what is there: then read it anew."""
        return any(tail.rewritten for tail in self._tails.values())

    def read(self, *, ended: bool = True) -> list[Closed]:
        """Rounds that were not given before.

        While a run has not `ended`, a round comes when its time is there, which is written last.
        """
        try:
            self._untold += [Record.read(line) for line in self._tails["rounds.jsonl"]]
        except (TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / 'rounds.jsonl'} has a line of another form: {error}"
            ) from error
        self._timings |= {line["round"]: line for line in self._tails["timings.jsonl"]}
        for line in self._tails["refusals.jsonl"]:
            self.refusals.append((line["round"], str(line.get("reason", ""))))
        found = []
        while self._untold and (ended or self._untold[0].round in self._timings):
            record = self._untold.popleft()
            time = self._timings.pop(record.round, {})
            parts = _Ledgered(self, record.round)
            found.append(Closed(record, parts, time.get("seconds"), time.get("phases", {})))
        return found

    def participants(self, round: int) -> list[Participant]:
        """Who took part in a round, from its line in the ledger."""
        ledger = self._tails["ledger.jsonl"]
        if round not in self._places:
            self._places |= {line["round"]: place for place, line in ledger.placed()}
        if round not in self._places:
            return []
        with ledger.path.open("rb") as file:
            file.seek(self._places[round])
            line = _line(file.readline()) or {}
        return [Participant(*each) for each in line.get("participants", ())]


@dataclass(frozen=True)
class _Ledgered:
    """Who took part in a round, read when somebody looks: it is most of what a folder holds."""

    run: RunTail
    round: int

    def __iter__(self) -> Iterator[Participant]:
        return iter(self.run.participants(self.round))


def _line(text: bytes) -> dict[str, Any] | None:
    """What a whole line says; None if it is not one."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("round"), int) else None
