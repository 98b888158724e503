"""`atoll flower PATH`."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from pathlib import Path

from atoll.cli.outcome import print_run
from atoll.errors import AtollError, ConfigurationError
from atoll.flower import read_app, run_app
from atoll.tracking.folder import RunFolder, new_folder
from atoll.tracking.progress import progress


def run(options: argparse.Namespace) -> int:
    """Run a Flower app in this process, and keep a run folder."""
    # Flower says every round in several lines; progress is one.
    logging.getLogger("flwr").setLevel(logging.INFO if options.verbose else logging.ERROR)
    settings = dict(_pair(text) for text in options.set)
    try:
        app = read_app(options.path).told(settings, options.clients)
    except AtollError:
        raise
    except Exception as error:
        return _broken(error, options.path)
    root = Path(options.runs)
    folder = root / options.name if options.name else new_folder(root, app.name)
    keeper = RunFolder(folder, every=None, figures=False)
    try:
        found = run_app(
            app, seed=options.seed, workers=options.workers, observers=[keeper, progress()]
        )
    except AtollError:
        raise
    except Exception as error:
        return _broken(error, options.path)
    print_run(found)
    if found.history and all(record.accepted == 0 for record in found.history):
        print(f"atoll: no client ever delivered; the first said: {found.refusals[0]}",
              file=sys.stderr)  # fmt: skip
        return 1
    print(f"run folder: {folder}")
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"--set takes NAME=VALUE, not {text!r}")
    return name.strip(), value.strip()


def _broken(error: Exception, path: str) -> int:
    """An error of the app's own: people need the place, which only its traceback says."""
    traceback.print_exception(error, file=sys.stderr)
    print(f"atoll: the app {path} raised {type(error).__name__}: {error}", file=sys.stderr)
    return 1
