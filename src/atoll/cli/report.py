"""`atoll report RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

from atoll.cli.files import find_run
from atoll.view.report import write_report


def run(options: argparse.Namespace) -> int:
    """One HTML file about a run."""
    folder = find_run(options.run, options.runs)
    path = write_report(folder, Path(options.output) if options.output else folder / "report.html")
    print(f"written: {path}")
    return 0
