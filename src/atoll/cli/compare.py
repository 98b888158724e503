"""`atoll compare RUN RUN ...`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atoll.cli.files import find_run
from atoll.cli.tables import figure, print_table
from atoll.errors import ConfigurationError, MissingPackage
from atoll.learners.metrics import directions, main_metric, more_is_better
from atoll.tracking.loggers import flat
from atoll.tracking.reading import name_of, read_run
from atoll.tracking.record import Run, human_bytes, human_seconds
from atoll.view.plots import draw_metric


def run(options: argparse.Namespace) -> int:
    """A table of runs, what differs between them, and a picture."""
    folders = [find_run(name, options.runs) for name in options.run]
    unique = len({name_of(folder) for folder in folders}) == len(folders)
    runs = {name_of(folder) if unique else str(folder): read_run(folder) for folder in folders}
    for name, each in runs.items():
        if not each.history:
            raise ConfigurationError(f"{name} has no closed round to compare")
    common = set.intersection(*(each.names for each in runs.values()))
    metric = options.metric or main_metric(common)
    rows = []
    for name, each in runs.items():
        rounds, values = each.series(metric)
        higher = more_is_better(metric, directions(each.config, each.data))
        best = max(values) if higher else min(values)
        rows.append(
            (
                name,
                figure(values[-1]),
                f"{figure(best)} in round {rounds[values.index(best)]}",
                str(len(each.history)),
                human_bytes(each.bytes_up),
                human_bytes(each.bytes_down),
                human_seconds(each.seconds),
            )
        )
    print_table(("run", metric, "best", "rounds", "sent", "received", "time"), rows)
    differences = list(_differences(runs))
    if differences:
        print()
        print_table(("setting", *runs), differences)
    path = Path(options.plot) if options.plot else Path(options.runs) / "compare.png"
    try:
        print(f"drawn: {draw_metric(runs, path, metric, options.against)}")
    except MissingPackage as missing:
        if options.plot:
            raise
        print(f"not drawn: {missing}")
    return 0


def _differences(runs: Mapping[str, Run]) -> Iterator[tuple[str, ...]]:
    """Settings that are not the same in all runs."""
    settings = [_settings(run) for run in runs.values()]
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name, "-") for each in settings]
        if len(set(values)) > 1:
            yield (name, *(value if len(value) < 40 else f"{value[:37]}..." for value in values))


def _settings(run: Run) -> dict[str, str]:
    whole: dict[str, Any] = {**run.config, "data": run.data, "seed": run.seed}
    return {name: value for name, value in flat(whole) if not name.endswith("digest")}
