"""`atoll explain FILE.py`."""

from __future__ import annotations

import argparse

from atoll.cli.files import read_federation


def run(options: argparse.Namespace) -> int:
    """Engine, reasons, workers, memory, and how each layer is run."""
    federation, clients, _ = read_federation(options.file)
    print(federation.explain(clients, engine=options.engine))
    return 0
