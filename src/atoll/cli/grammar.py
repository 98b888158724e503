"""The grammar of the commands that serve a federation."""

from __future__ import annotations

import argparse
import math
from typing import Any

#: Seconds of ten years.
LONGEST = 10 * 365 * 86400.0


def _number(kind: type[int] | type[float], least: float, most: float, bounds: str) -> Any:
    """A reader of numbers of a kind within bounds, which it says."""

    def read(text: str) -> int | float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {bounds}")
        return value

    read.__name__ = kind.__name__  # what argparse calls a text that is no such number
    return read


positive = _number(int, 1, math.inf, "at least 1")
seed = _number(int, 0, math.inf, "at least 0")
port = _number(int, 0, 65535, "a port, from 0 to 65535")
_round = _number(int, 0, 10**9 - 1, "the number of a round")
_seconds = _number(float, 0, LONGEST, f"from 0 to {LONGEST:.0f} seconds")
_lease = _number(float, 1, LONGEST, f"from 1 to {LONGEST:.0f} seconds")
fraction = _number(float, 0, math.nextafter(1, 0), "at least 0 and below 1")
_hours = _number(float, math.ulp(0.0), LONGEST / 3600, "more than 0, and ten years at most")


def add_serving(commands: Any) -> None:
    """The commands of a federation that is served."""

    _server(commands)
    _site(commands)
    _operations(commands)


def _state(
    commands: Any, name: str, help: str, what: str = "a state folder"
) -> argparse.ArgumentParser:
    """A command about a state folder."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=help)
    command.add_argument("state", metavar="STATE", help=what)
    command.set_defaults(module="state", action=name)
    return command


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _server(commands: Any) -> None:
    init = _state(commands, "init", "make the state folder of a federation", "a new folder")
    init.add_argument("--project", help="the project's name; default: the folder's")
    init.add_argument(
        "--host", action="append", help="a name or address that sites reach the server by; several"
        " may be given; default: localhost",
    )  # fmt: skip

    init.add_argument("--database", metavar="URL", help="postgresql://...; default: in the folder")

    hosts = _state(commands, "hosts", "make the server's certificate for other names")
    hosts.add_argument("name", nargs="+", help="every name and address it is reached by")

    serve = commands.add_parser("serve", help="serve a federation to real sites")
    serve.add_argument("file", help="a file that defines `federation`")
    serve.add_argument("--state", required=True, metavar="FOLDER", help="made by atoll init")
    serve.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    serve.add_argument("--seed", type=seed, default=0)
    serve.add_argument("--host", default="0.0.0.0", help="address to listen on; default: all")
    serve.add_argument("--port", type=port, default=8443)
    serve.add_argument("--database", metavar="URL", help="postgresql://...; default: in the folder")
    serve.add_argument("--blobs", metavar="PLACE", help="s3://...; default: in the folder")
    serve.add_argument(
        "--sites", type=positive, help="how many must be there before the first round; "
        "default: the cohort or, without one, everyone who was invited",
    )  # fmt: skip
    serve.add_argument(
        "--lease", type=_lease, default=900.0, metavar="SECONDS",
        help="a site that is not heard of for so long is given up for the round; default: 900",
    )  # fmt: skip
    serve.add_argument(
        "--linger", type=_seconds, default=600.0, metavar="SECONDS",
        help="how long to answer after the end, for sites to fetch the model; default: 600",
    )  # fmt: skip
    serve.add_argument(
        "--test",
        metavar="FILE",
        help="a file whose `data`, or a table on which, each model is tested",
    )
    serve.add_argument("--log", choices=("text", "json"), default="text")
    serve.set_defaults(module="serve")

    invite = _state(commands, "invite", "make a one-time token for a site")
    invite.add_argument("name", help="what the site will be called, e.g. hospital-a")
    invite.add_argument("--role", choices=("site", "analyst", "admin"), default="site")
    invite.add_argument("--hours", type=_hours, default=72.0, help="it is good for; default: 72")


def _site(commands: Any) -> None:
    join = commands.add_parser("join", help="run a site's agent, beside its data")
    join.add_argument("url", help="https://HOST:PORT of the server")
    join.add_argument("file", help="the site's own copy of the federation's file")
    join.add_argument(
        "--held-out",
        type=fraction,
        default=0.2,
        metavar="FRACTION",
        help="of a table's or Dataset's rows, to say how good models are here and not to train on; "
        "default: 0.2",
    )
    join.add_argument(
        "--unit",
        action="append",
        default=[],
        metavar="COLUMN=UNIT",
        help="what a table's column is counted in, where its name does not say so",
    )
    join.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="a file that defines `data`, "
        "or a .csv or .parquet that the federation's encoding describes",
    )
    join.add_argument("--token", help="the one-time token, or - for standard input; the variable "
                      "ATOLL_TOKEN is safer, needed only once")  # fmt: skip
    join.add_argument("--token-file", metavar="FILE", help="a file that holds the token")
    join.add_argument("--folder", default="site", help="where the agent keeps its things")
    join.add_argument("--ask", action="store_true", help="wait for `atoll approve` before training")
    join.add_argument(
        "--undeclared",
        action="store_true",
        help="do not tell the server how many examples are here",
    )
    join.add_argument(
        "--resources", metavar="LIST", help="what to declare for selection, e.g. "
        "charging,unmetered,speed=12 (local steps a second); default: nothing",
    )  # fmt: skip
    join.add_argument(
        "--public-ca", action="store_true", help="trust the system's authorities: the server is "
        "behind a proxy with a public certificate",
    )  # fmt: skip
    join.add_argument("--threads", type=positive, help="threads for training")
    join.add_argument("--log", choices=("text", "json"), default="text")
    join.set_defaults(module="join")

    approve = commands.add_parser("approve", help="agree to the terms a site was offered")
    approve.add_argument("folder", help="the agent's folder")
    approve.add_argument("--refuse", action="store_true", help="refuse them")
    approve.set_defaults(module="state", action="approve")

    enrol = commands.add_parser("enrol", help="make an analyst's or admin's identity")
    enrol.add_argument("url", help="https://HOST:PORT of the server")
    enrol.add_argument("--token", help="the one-time token; the variable ATOLL_TOKEN is safer")
    enrol.add_argument("--public-ca", action="store_true", help="as for join")
    enrol.add_argument("--folder", required=True, help="where to keep the identity")
    enrol.set_defaults(module="state", action="enrol")


def _anywhere(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    """A command on the server's machine, or from elsewhere by an identity."""
    either = "a state folder, or the folder of an identity made by atoll enrol"
    command = _state(commands, name, help, either)
    command.add_argument("--url", help="of an identity: where the server is now; it is kept")
    return command


def _operations(commands: Any) -> None:
    _json(_anywhere(commands, "status", "how a federation stands"))
    rounds = _anywhere(commands, "rounds", "a federation's rounds")
    rounds.add_argument(
        "--since", type=_round, default=0, metavar="ROUND", help="only those after this one"
    )
    _json(rounds)
    _json(_anywhere(commands, "sites", "who has joined a federation, or is invited"))
    _anywhere(commands, "revoke", "refuse a site from now on").add_argument("name")
    _anywhere(commands, "stop", "end a federation; it can be served again")
    _anywhere(commands, "page", "a link to the live page of a federation")
    audit = commands.add_parser("audit", help="check or show the audit log")
    audit.add_argument("what", choices=("verify", "show"))
    audit.add_argument("state", metavar="STATE", help="a state folder")
    audit.add_argument("--expect", metavar="DIGEST", help="the last digest, as noted before")
    audit.set_defaults(module="state", action="audit")
    _state(commands, "backup", "write a state folder into an archive").add_argument("file")
    restore = commands.add_parser("restore", help="make a state folder from an archive")
    restore.add_argument("file", help="an archive that atoll backup wrote")
    restore.add_argument("state", metavar="STATE", help="a new folder")
    restore.set_defaults(module="state", action="restore")
