"""The command line: simulate, look at runs, serve a federation, join one, look after it.

Commands are imported when they are called, so that `atoll --help` is instant. Exit codes: 0 done,
1 a problem that is said in a sentence, 2 a command line that makes no sense, 3 a federation that
was given up, 4 a site that is not let in, 5 a server that was not reached, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from atoll import __version__
from atoll.cli.grammar import add_serving, port, positive, seed
from atoll.errors import AtollError

RUNS = "runs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command = import_module(f"atoll.cli.{options.module}")
    try:
        return int(command.run(options))
    except AtollError as error:
        print(f"atoll: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("atoll: stopped", file=sys.stderr)
        return 130
    except SystemExit as error:
        # Commands give their code back: this is people's code, and the work is not done.
        print(f"atoll: something that was run called sys.exit({error.code!r})", file=sys.stderr)
        return int(error.code or 1) if isinstance(error.code, int) else 1
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); what is left has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if options.module in WORKING else 0
    except UnicodeError as error:
        print(f"atoll: something that was given is no proper text: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"atoll: {where}{error.strerror or error}", file=sys.stderr)
        return 1


#: Commands that do something: cut off, they have not done it.
WORKING = frozenset({"demo", "flower", "join", "serve", "simulate", "sweep"})


class Parser(argparse.ArgumentParser):
    """A parser for which `--option=--` lacks its argument; before Python 3.13 it is a list."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)


def parser() -> argparse.ArgumentParser:
    """The grammar of all commands."""
    top = Parser(
        prog="atoll",
        description="Federated learning: describe a federation, simulate it, compare, serve it.",
    )
    top.add_argument("--version", action="version", version=f"atoll {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train on real data and compare with local training")
    demo.add_argument("--seed", type=seed, default=0)
    demo.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders go")
    demo.set_defaults(module="demo")

    simulate = commands.add_parser("simulate", help="simulate the federation of a Python file")
    simulate.add_argument("file", help="a file that defines `federation` and `clients`")
    simulate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the federation, e.g. --set schedule.rounds=100 --set learner.lr=0.05",
    )
    simulate.add_argument("--seed", type=seed, help="seed of every draw (0, or that of --resume)")
    simulate.add_argument("--resume", metavar="RUN", help="go on with this run")
    simulate.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders go")
    simulate.add_argument("--name", help="name of the run folder (the file's name and a number)")
    simulate.add_argument(
        "--checkpoint-every", type=positive, default=10, metavar="ROUNDS", help="default: 10"
    )
    simulate.add_argument(
        "--baselines", action="store_true", help="train centrally and locally too, and compare"
    )
    simulate.add_argument(
        "--engine",
        help="how clients are run: auto, sequential, stacked, or 'stacked(block=10, workers=2)'; "
        "default: chosen by rule",
    )
    _page(simulate)
    simulate.set_defaults(module="simulate")

    sweep = commands.add_parser("sweep", help="simulate each combination of settings, and compare")
    sweep.add_argument("file", help="a file that defines `federation`, `clients`, maybe `choices`")
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="e.g. --grid learner.lr=0.01,0.1 --grid algorithm=fedavg,scaffold, the latter by the "
        "names in the file's choices = {'algorithm': {'fedavg': FedAvg(), ...}}",
    )
    sweep.add_argument("--seeds", type=positive, default=1, help="runs of each; default: 1")
    sweep.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="as for simulate, in all of them")  # fmt: skip
    sweep.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders go")
    sweep.add_argument("--name", help="folder of the sweep's runs (the file's name and -sweep)")
    sweep.add_argument("--engine", help="as for simulate")
    sweep.add_argument("--metric", help="what to compare; default: accuracy, or the loss")
    sweep.add_argument("--csv", metavar="FILE", help="write the table as .csv")
    sweep.add_argument("--latex", metavar="FILE", help="write the table as LaTeX, for booktabs")
    sweep.add_argument("--plot", metavar="FILE", help="draw into this file, e.g. .png, .svg, .pdf")
    sweep.set_defaults(module="sweep")

    explain = commands.add_parser("explain", help="say how a federation would be run, and why")
    explain.add_argument("file", help="a file that defines `federation` and `clients`")
    explain.add_argument("--engine", help="as for simulate")
    explain.set_defaults(module="explain")

    _reading(commands)
    _models(commands)
    _flower(commands)

    data = commands.add_parser("data", help="list data sets, or show what one holds")
    data.add_argument("name", nargs="?", help="a data set to load and describe")
    data.set_defaults(module="data")
    _tables(commands)
    add_serving(commands)
    return top


def _reading(commands: Any) -> None:
    runs = commands.add_parser("runs", help="list runs")
    runs.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders are")
    runs.set_defaults(module="runs")

    show = commands.add_parser("show", help="show one run")
    show.add_argument("run", metavar="RUN", help="a run folder, or its name")
    _drawing(show)
    show.add_argument("--json", action="store_true", help="print the rounds as JSON lines")
    _page(show)
    show.set_defaults(module="show")

    compare = commands.add_parser("compare", help="compare runs in a table and a plot")
    compare.add_argument("run", nargs="+", metavar="RUN", help="run folders, or their names")
    _drawing(compare)
    compare.set_defaults(module="compare")

    report = commands.add_parser("report", help="write one HTML file about a run")
    report.add_argument("run", metavar="RUN", help="a run folder, or its name")
    report.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders are")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")
    report.set_defaults(module="report")


def _models(commands: Any) -> None:
    export = commands.add_parser("export", help="write a run's model as a file of its framework's")
    export.add_argument("model", metavar="RUN", help="a run or state folder, or a saved model")
    export.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders are")
    export.add_argument("--best", action="store_true", help="the best model; default: the last")
    export.add_argument("--federation", metavar="FILE", help="its file, which .onnx needs")
    export.add_argument(
        "--output", required=True, metavar="FILE", help=".safetensors, .npz, .pt or .onnx"
    )
    export.set_defaults(module="export")

    predict = commands.add_parser("predict", help="what a model says of a table's rows")
    predict.add_argument("model", metavar="MODEL", help="a saved model, or a run or state folder")
    predict.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders are")
    predict.add_argument("--federation", required=True, metavar="FILE", help="the file it is of")
    predict.add_argument("--data", required=True, metavar="TABLE", help="a .csv or .parquet file")
    predict.add_argument(
        "--unit",
        action="append",
        default=[],
        metavar="COLUMN=UNIT",
        help="what a column is counted in, where its name does not say so",
    )
    predict.add_argument("--output", metavar="FILE", help="a .csv file; default: print some rows")
    predict.set_defaults(module="predict")


def _tables(commands: Any) -> None:
    told = commands.add_parser("summarize", help="tell what a table's columns are")
    told.add_argument("table", metavar="TABLE", help="a .csv or .parquet file")
    told.add_argument("--label", required=True, metavar="COLUMN", help="the column to predict")
    told.add_argument("--features", nargs="+", metavar="COLUMN", help="default: all others")
    told.add_argument(
        "--leave-out", nargs="+", default=[], metavar="COLUMN", help="told nothing of"
    )
    told.add_argument(
        "--unit",
        action="append",
        default=[],
        metavar="COLUMN=UNIT",
        help="what a column is counted in; 'weight [kg]' as its name says it too",
    )
    told.add_argument(
        "--no-value",
        action="append",
        default=[],
        metavar="[COLUMN=]TEXT",
        help="a text or number that means that there is no value",
    )
    told.add_argument(
        "--least",
        type=positive,
        default=5,
        metavar="ROWS",
        help="values that fewer rows hold are not named; default: 5",
    )
    told.add_argument("--site", metavar="NAME", help="whose table it is; default: the file's name")
    told.add_argument("--output", metavar="FILE", help="default: NAME.summary.json")
    told.set_defaults(module="encoding")

    agree = commands.add_parser("agree", help="make one encoding of several sites' summaries")
    agree.add_argument("summary", nargs="+", metavar="SUMMARY", help="what `summarize` wrote")
    agree.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OTHER=NAME",
        help="another name of a column",
    )
    agree.add_argument(
        "--value",
        action="append",
        default=[],
        metavar="COLUMN:OTHER=VALUE",
        help="another spelling of a category or class",
    )
    agree.add_argument(
        "--unit",
        action="append",
        default=[],
        metavar="COLUMN:UNIT=FACTOR",
        help="another unit, and what its values are multiplied by",
    )
    agree.add_argument(
        "--alike",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns whose different values or sizes are right",
    )
    agree.add_argument(
        "--leave-out", nargs="+", default=[], metavar="COLUMN", help="columns that become no input"
    )
    agree.add_argument(
        "--missing",
        choices=("refuse", "indicator"),
        default="refuse",
        help="rows without a value: refused (default), or filled, flagged",
    )
    agree.add_argument(
        "--unknown",
        choices=("refuse", "zeros"),
        default="refuse",
        help="categories that no site tells: refused (default), or zeros",
    )
    agree.add_argument(
        "--scale",
        action="store_true",
        help="bring numbers to mean 0 and deviation 1 over all sites",
    )
    agree.add_argument(
        "--task",
        choices=("classification", "regression"),
        help="default: classes where the label has few different values",
    )
    agree.add_argument(
        "--output", default="encoding.json", metavar="FILE", help="default: encoding.json"
    )
    agree.set_defaults(module="encoding")


def _flower(commands: Any) -> None:
    flower = commands.add_parser("flower", help="run a Flower app on this machine")
    flower.add_argument("path", metavar="PATH", nargs="?", default="",
                        help="the app's folder, or a script")  # fmt: skip
    flower.add_argument("-m", dest="module_name", metavar="MODULE",
                        help="a script by its module's name, e.g. -m package.main")  # fmt: skip
    flower.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="of the script; after --")
    flower.add_argument("--clients", type=positive, help="how many; default: what the app says, "
                        "or as many as Flower starts")  # fmt: skip
    flower.add_argument("--seed", type=seed, default=0)
    flower.add_argument("--workers", type=positive, default=1, help="processes for clients; "
                        "default: this one")  # fmt: skip
    flower.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="change the app's run config, e.g. --set num-server-rounds=10",
    )  # fmt: skip
    flower.add_argument(
        "--node-config", action="append", default=[], metavar="NAME=VALUE",
        help="what clients' nodes are told; {partition-id} in it is a client's number",
    )  # fmt: skip
    flower.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders go")
    flower.add_argument("--name", help="name of the run folder (the app's name and a number)")
    flower.add_argument("--verbose", action="store_true", help="let Flower say all it has to say")
    flower.set_defaults(module="flower")


def _page(command: argparse.ArgumentParser) -> None:
    command.add_argument("--web", action="store_true", help="open a live page on 127.0.0.1")
    command.add_argument("--port", type=port, default=0, help="of the page; default: a free one")


def _drawing(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runs", default=RUNS, metavar="FOLDER", help="where run folders are")
    command.add_argument("--metric", help="what to draw; default: accuracy, or the loss")
    command.add_argument("--against", default="round", choices=("round", "bytes", "seconds"))
    command.add_argument("--plot", metavar="FILE", help="draw into this image file")
