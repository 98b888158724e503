"""`atoll show RUN`."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from atoll.cli.files import find_run
from atoll.cli.outcome import print_run
from atoll.learners.metrics import main_metric
from atoll.rounds.describe import short
from atoll.tracking.reading import name_of, read_engine, read_run, read_status


def run(options: argparse.Namespace) -> int:
    """What was tried, what came of it, and a picture if one is asked for."""
    folder = find_run(options.run, options.runs)
    if options.web:
        return _web(folder, options.port)
    shown = read_run(folder)
    if options.json:
        for record in shown.history:
            print(json.dumps(record.json()))
        return 0
    print(f"{folder}: {read_status(folder)}, seed {shown.seed}")
    for name in ("algorithm", "pipeline", "schedule", "learner"):
        print(f"  {name:<9}  {short(shown.config[name])}")
    engine = read_engine(folder)
    if engine is not None:
        print(f"  engine     {engine}")
    if shown.stopped:
        print(f"  stopped    {shown.stopped}")
    print_run(shown)
    if options.plot:
        metric = options.metric or main_metric(shown.metrics)
        print(f"drawn: {shown.plot(Path(options.plot), metric, options.against)}")
    else:
        figures = sorted((folder / "figures").glob("*.png"))
        if figures:
            print(f"figures: {', '.join(str(path) for path in figures)}")
    return 0


def _web(folder: Path, port: int) -> int:
    """The page, until Ctrl-C."""
    from atoll.view.page.local import LocalPage

    place = folder.resolve()
    with LocalPage(place.parent, name_of(place), port) as page:
        print(f"{name_of(place)} is at {page.url} until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            page.wait()
    return 0
