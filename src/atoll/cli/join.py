"""`atoll join URL FILE.py --data SITE.py`: the agent of one site."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from functools import partial
from pathlib import Path

from atoll.cli.encoding import pair
from atoll.cli.files import read_data, read_plan
from atoll.cli.logs import log_to
from atoll.errors import ConfigurationError
from atoll.learners.base import stacking
from atoll.protocol.identity import Token
from atoll.site.agent import Site
from atoll.site.connection import Stopped
from atoll.site.terms import Terms

#: What an agent's end is to whoever started it (see docs/promises.md).
ENDS = {"done": 0, "given up": 3, "stopped": 130, "left": 130}


def run(options: argparse.Namespace) -> int:
    """Join, and work until the federation is over."""
    federation = read_plan(options.file)
    data = read_data(
        options.data, federation.encoding, options.held_out,
        dict(pair(text, "--unit") for text in options.unit),
    )  # fmt: skip
    if options.threads:
        stacking(federation.learner).use_threads(options.threads)
    log_to(options.log)
    terms = Terms.of(federation, Path(options.file)) if options.ask else None
    site = Site(
        Path(options.folder), federation, data, terms, declare=not options.undeclared,
        resources=_resources(options.resources),
        report=_say,
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, partial(_leave, site))
    try:
        site.join(options.url, _token(options), options.public_ca)
    except Stopped:
        return ENDS["left"]
    ended = site.run()
    if ended.model is not None:
        print(f"model: {ended.model}")
    return ENDS[ended.outcome]


def _say(text: str) -> None:
    """Say how it goes; a reader that has gone away ends no training."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(site: Site, number: int, frame: object) -> None:
    """The first signal lets the work at hand be finished, the second one ends it."""
    if site.leaving.is_set():
        raise KeyboardInterrupt
    site.stop()
    if site.at_work:
        _say(
            "leaving when this training is done and sent; once more (Ctrl-C) ends it now, and the "
            "round goes on without this site"
        )


def _resources(text: str | None) -> dict[str, str]:
    """`charging,unmetered,speed=12` as what is said to the server."""
    said = {}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = item.partition("=")
        number = value.replace(".", "", 1).isdecimal()
        if name in ("charging", "unmetered") and not equals:
            said[name] = "yes"
        elif name == "speed" and number:
            said[name] = value
        else:
            raise ConfigurationError(
                f"--resources knows charging, unmetered and speed=STEPS_A_SECOND, not {item!r}"
            )
    return said


def _token(options: argparse.Namespace) -> Token | None:
    """The token from where secrets are safest: a file or the environment, else the command."""
    if options.token_file:
        try:
            return Token.read(Path(options.token_file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"{options.token_file}: {error.strerror}") from None
    text = options.token or os.environ.get("ATOLL_TOKEN", "")
    if text == "-":
        text = sys.stdin.readline()
    return Token.read(text) if text else None
