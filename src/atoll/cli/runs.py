"""`atoll runs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from atoll.cli.tables import figure, print_table
from atoll.errors import AtollError
from atoll.learners.metrics import main_metric
from atoll.tracking.reading import find_runs, name_of, read_run, read_status
from atoll.tracking.record import human_bytes, human_seconds


def run(options: argparse.Namespace) -> int:
    """One line per run."""
    root = Path(options.runs)
    found = find_runs(root)
    if not found:
        print(f"no runs in {root}; make one with: atoll demo, or atoll simulate FILE.py")
        return 0
    rows = []
    for path in found:
        try:
            each = read_run(path)
        except AtollError as error:
            rows.append((name_of(path), "damaged", str(error), "", "", "", "", ""))
            continue
        metric = main_metric(each.metrics)
        algorithm = str(each.config["algorithm"]["kind"]).rpartition(".")[2]
        rows.append(
            (
                name_of(path),
                read_status(path),
                str(each.data["name"]),
                algorithm,
                f"{len(each.history)}/{each.rounds}",
                f"{figure(each.metrics.get(metric))} {metric}" if each.metrics else "-",
                human_bytes(each.bytes_up),
                human_seconds(each.seconds),
            )
        )
    names = ("run", "status", "data", "algorithm", "rounds", "latest", "sent", "time")
    print_table(names, rows)
    return 0
