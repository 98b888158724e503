"""`atoll sweep FILE.py --grid NAME=VALUE,VALUE`: a run for each combination and seed, one table."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from atoll.cli.files import read_sweep
from atoll.cli.overrides import override
from atoll.cli.tables import figure, print_table
from atoll.errors import CheckpointError, ConfigurationError, MissingPackage
from atoll.federation import Federation
from atoll.learners.metrics import directions, main_metric, more_is_better
from atoll.tracking.folder import RunFolder
from atoll.tracking.reading import read_run, read_status
from atoll.tracking.record import Run
from atoll.view.plots import draw_bands

#: What one combination sets: (name, value as it is written).
Combination = tuple[tuple[str, str], ...]


def run(options: argparse.Namespace) -> int:
    """Run what is not there yet, and compare."""
    federation, clients, devices, choices = read_sweep(options.file)
    federation = override(federation, options.set)
    grid = [_alternatives(text) for text in options.grid]
    combinations = [tuple(each) for each in product(*grid)]
    plans = {each: _plan(federation, each, choices) for each in combinations}
    root = Path(options.runs) / (options.name or f"{Path(options.file).stem}-sweep")
    found: dict[Combination, list[Run]] = {}
    total = len(plans) * options.seeds
    for number, (each, seed) in enumerate(product(plans, range(options.seeds))):
        folder = root / _folder(each, seed)
        there = read_status(folder) == "finished" if folder.exists() else False
        print(f"{number + 1} of {total}: {folder}" + (" (is there)" if there else ""), flush=True)
        if not there:
            plans[each].simulate(
                clients, seed=seed, devices=devices, engine=options.engine,
                folder=RunFolder(folder, best=federation.evaluation.best, figures=False),
                resume=(folder / "config.json").exists(),
            )  # fmt: skip
        found.setdefault(each, []).append(_checked(read_run(folder), folder))
    runs = [each for several in found.values() for each in several]
    metric = options.metric or main_metric(set.intersection(*(each.names for each in runs)))
    heads, rows = _table(found, metric)
    print()
    print_table(heads, rows)
    if options.csv:
        with Path(options.csv).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([heads, *rows])
        print(f"written: {options.csv}")
    if options.latex:
        Path(options.latex).write_text(_latex(heads, rows), encoding="utf-8")
        print(f"written: {options.latex}")
    _draw(found, metric, options.plot, root / "sweep.png")
    return 0


def _alternatives(text: str) -> list[tuple[str, str]]:
    """`NAME=A,B` as its alternatives; a comma within brackets or quotes separates nothing."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ConfigurationError(f"--grid needs NAME=VALUE,VALUE, not {text!r}")
    parts, depth, quote = [""], 0, ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if not all(parts) or len(set(parts)) < len(parts):
        raise ConfigurationError(f"--grid {text!r}: a value is empty, or there twice")
    return [(name, part) for part in parts]


def _plan(
    federation: Federation, settings: Combination, choices: Mapping[str, Mapping[str, Any]]
) -> Federation:
    for name, value in settings:
        if name in choices:
            if value not in choices[name]:
                known = ", ".join(choices[name])
                raise ConfigurationError(f"choices[{name!r}] has no {value!r}; it has {known}")
            federation = replace(federation, **{name: choices[name][value]})
        else:
            federation = override(federation, [f"{name}={value}"])
    return federation


def _folder(settings: Combination, seed: int) -> str:
    told = [f"{name.rpartition('.')[2]}={value}" for name, value in settings]
    kept = "".join(c if c.isalnum() or c in "=.,-+" else "_" for c in " ".join([*told]))
    return f"{kept or 'plain'}-seed-{seed}"


def _checked(found: Run, folder: Path) -> Run:
    if not found.history:
        raise CheckpointError(f"{folder} has no closed round to compare")
    return found


def _table(
    found: Mapping[Combination, Sequence[Run]], metric: str
) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each combination, the best first: mean and deviation over seeds."""
    first = next(iter(found.values()))[0]
    higher = more_is_better(metric, directions(first.config, first.data))
    scored = []
    for settings, several in found.items():
        series = [each.series(metric)[1] for each in several]
        last = [values[-1] for values in series]
        best = [max(values) if higher else min(values) for values in series]
        rounds = {len(each.history) for each in several}
        row = [value for _, value in settings]
        row += [_of(last), _of(best), "-".join(map(str, sorted({min(rounds), max(rounds)})))]
        scored.append((mean(last), row))
    scored.sort(
        key=lambda item: math.inf if math.isnan(item[0]) else -item[0] if higher else item[0]
    )
    names = [name for name, _ in next(iter(found))]
    seeds = len(next(iter(found.values())))
    over = f" (mean of {seeds} seeds)" if seeds > 1 else ""
    return [*names, f"{metric}{over}", f"best {metric}", "rounds"], [row for _, row in scored]


def _of(values: Sequence[float]) -> str:
    spread = f" ± {figure(stdev(values))}" if len(values) > 1 else ""
    return f"{figure(mean(values))}{spread}"


def _latex(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a paper, with booktabs' rules."""

    def line(cells: Sequence[str]) -> str:
        plain = (cell.replace("\\", r"\textbackslash ") for cell in cells)
        safe = ("".join(f"\\{c}" if c in "&%$#_{}" else c for c in cell) for cell in plain)
        return " & ".join(cell.replace("±", r"$\pm$") for cell in safe) + r" \\"

    body = "\n".join(line(row) for row in rows)
    columns = "l" * len(heads)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(heads)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def _draw(
    found: Mapping[Combination, Sequence[Run]], metric: str, wanted: str | None, usual: Path
) -> None:
    named = {", ".join(_words(settings)) or "as it is": runs for settings, runs in found.items()}
    try:
        print(f"drawn: {draw_bands(named, Path(wanted) if wanted else usual, metric)}")
    except MissingPackage as missing:
        if wanted:
            raise
        print(f"not drawn: {missing}")


def _words(settings: Combination) -> Iterator[str]:
    for name, value in settings:
        yield f"{name.rpartition('.')[2]} {value}"
