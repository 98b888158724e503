"""`atoll flower PATH`."""

from __future__ import annotations

import argparse
import logging
import sys
import tomllib
import traceback
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from atoll.cli.outcome import print_run
from atoll.errors import AtollError, ConfigurationError
from atoll.flower import App, read_app, run_app, simulations_of
from atoll.tracking.folder import RunFolder, new_folder
from atoll.tracking.progress import progress


def run(options: argparse.Namespace) -> int:
    """Run a Flower app in this process, and keep a run folder."""
    # Flower says every round in several lines; progress is one. What the app says is its own.
    if options.verbose:
        logging.getLogger("atoll.flower").setLevel(logging.DEBUG)
        logging.basicConfig(format="%(message)s")
    else:
        logging.getLogger("flwr").addFilter(_of_the_app)
    settings = dict(_pair(text) for text in options.set)
    nodes = {name: _plain(text) for name, text in map(_pair, options.node_config)}
    path = Path(options.path)
    barren: list[bool] = []

    def simulate(app: App) -> None:
        told = replace(app.told(settings, options.clients), node_config=nodes)
        barren.append(_kept(told, options))

    try:
        if options.module_name:
            words = [*([options.path] if options.path else []), *options.arguments]
            simulations_of(options.module_name, simulate, words)
        elif not options.path:
            raise ConfigurationError("say which app: atoll flower FOLDER, FILE.py or -m MODULE")
        elif path.suffix == ".py" and path.is_file():
            simulations_of(path, simulate, options.arguments)
        else:
            simulate(read_app(path, options.seed))
    except AtollError:
        raise
    except Exception as error:
        return _broken(error, options.module_name or options.path)
    return 1 if any(barren) else 0


def _of_the_app(record: logging.LogRecord) -> bool:
    """Whether a line of Flower's logger is the app's own, or a warning."""
    return record.levelno >= logging.WARNING or not record.pathname.startswith(_inside_flower())


@cache
def _inside_flower() -> str:
    """The folder of Flower's own code."""
    inside = find_spec("flwr")
    return str(Path(inside.origin).parent) if inside and inside.origin else ""


def _kept(app: App, options: argparse.Namespace) -> bool:
    """Run an app into a folder; whether nobody ever delivered."""
    root = Path(options.runs)
    folder = root / options.name if options.name else new_folder(root, app.name)
    keeper = RunFolder(folder, every=None, figures=False)
    found = run_app(app, seed=options.seed, workers=options.workers, observers=[keeper, progress()])
    print_run(found)
    print(f"run folder: {folder}")
    if not found.refusals or any(record.accepted for record in found.history):
        return False
    print(f"atoll: no client ever delivered; the first said: {found.refusals[0]}", file=sys.stderr)
    return True


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"this takes NAME=VALUE, not {text!r}")
    return name.strip(), value.strip()


def _plain(text: str) -> bool | float | int | str:
    """A value as TOML has it, which Flower's own options are; the text itself otherwise."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
    return value if isinstance(value, bool | float | int | str) else text


def _broken(error: Exception, path: str) -> int:
    """An error of the app's own: people need the place, which only its traceback says."""
    traceback.print_exception(error, file=sys.stderr)
    print(f"atoll: the app {path} raised {type(error).__name__}: {error}", file=sys.stderr)
    return 1
