"""Tables for terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output; wide when it is not a terminal, so that pipes get whole lines."""
    return Console(
        width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False
    )


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows under headings (none if all are empty); columns of numbers are right-aligned."""
    rows = [list(row) for row in rows]
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        show_header=any(columns),
    )
    for position, name in enumerate(columns):
        values = [row[position] for row in rows]
        numeric = position > 0 and all(
            value[:1].isdigit() or value in ("", "-") for value in values
        )
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    console().print(table)


def figure(value: float | None, digits: int = 4) -> str:
    """A metric, or a dash where there is none; what four decimals cannot tell has its exponent."""
    if value is None or value != value:  # noqa: PLR0124
        return "-"
    told = value == 0 or 10.0**-digits <= abs(value) < 1e9
    return f"{value:.{digits}f}" if told else f"{value:.{digits}g}"
