"""Program: a module as rules for a tape, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atoll.learners.torch.stacking.tape import Tape, Value


class Refused(Exception):
    """Why a module, or a part of it, cannot be lowered."""


@dataclass(frozen=True)
class Row:
    """One line of the explanation: a layer, its kind, and how it is run."""

    layer: str
    kind: str
    how: str


@dataclass(frozen=True)
class Program:
    """A module as rules for a tape; `run` gives the outputs of a batch, rows merged.

    `layered` is False where the module is taken whole. `draws` says that something draws from
    torch's own generator, so that threads must not share a process; `streams` that dropout needs
    the clients' streams; `mixes` that a row's output depends on other rows (batch statistics);
    `complete` that every parameter is used exactly once; `linears` are weights of dense layers;
    `bytes_per_row` is about what a step makes for each example on its way forward.
    """

    run: Callable[[Tape, Value], Value]
    rows: tuple[Row, ...]
    layered: bool
    draws: bool
    streams: bool
    mixes: bool
    complete: bool
    dense: bool
    linears: frozenset[str] = frozenset()
    bytes_per_row: int = 0
