"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigurationError
from atoll.learners.metrics import directions, main_metric, more_is_better
from atoll.view.figure import COLOURS, picture

if TYPE_CHECKING:
    from atoll.tracking.record import Run

#: So many clients are named on an axis, by so many letters.
NAMED, LETTERS = 30, 16
#: Metrics that lie between 0 and 1.
SHARES = {"accuracy", "exact", "micro_f1", "macro_f1", "auc"}


def draw_metric(
    runs: Mapping[str, Run],
    path: Path,
    metric: str,
    against: str = "round",
    levels: Mapping[str, float] | None = None,
) -> Path:
    """One line per run (named by its key), against "round", "bytes" or simulated "seconds".

    `levels` are horizontal lines, for baselines.
    """
    if against not in ("round", "bytes", "seconds"):
        raise ConfigurationError(f"a plot is against round, bytes or seconds, not {against!r}")
    with picture(path) as (_, axes):
        banded = False
        for name, run in runs.items():
            rounds, values = run.series(metric)
            places = _places(run, rounds, against)
            (line,) = axes.plot(places, values, label=name, linewidth=1.8)
            banded |= _draw_spread(axes, run, metric, against, line.get_color(), not banded)
        for number, (name, value) in enumerate((levels or {}).items()):
            style = ("--", ":", "-.")[number % 3]
            axes.axhline(value, linestyle=style, color="0.35", linewidth=1.2)
            axes.annotate(
                name,
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize="small",
                color="0.25",
            )
        names = {"round": "round", "bytes": "communication, MB", "seconds": "simulated seconds"}
        axes.set_xlabel(names[against])
        axes.set_ylabel(metric.replace("_", " "))
        first = next(iter(runs.values()))
        axes.set_title(f"{_title(first)}: {metric.replace('_', ' ')}")
        if any(runs) or banded:
            axes.legend()
    return path


def draw_bands(groups: Mapping[str, Sequence[Run]], path: Path, metric: str) -> Path:
    """One line per group of runs (named by its key): the mean over them, and a deviation each way.

    The legend stands beside the axes, so that it covers nothing.
    """
    with picture(path) as (_, axes):
        for number, (name, runs) in enumerate(groups.items()):
            colour = COLOURS[number % len(COLOURS)]
            style = ("-", "--", "-.", ":")[number // len(COLOURS) % 4]
            series = [dict(zip(*run.series(metric), strict=True)) for run in runs]
            rounds = sorted(set.intersection(*(set(each) for each in series)))
            middle = [fmean(each[r] for each in series) for r in rounds]
            axes.plot(rounds, middle, style, color=colour, label=name, linewidth=1.8)
            if len(runs) > 1:
                spread = [stdev([each[r] for each in series]) for r in rounds]
                low = [m - s for m, s in zip(middle, spread, strict=True)]
                high = [m + s for m, s in zip(middle, spread, strict=True)]
                axes.fill_between(rounds, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("round")
        axes.set_ylabel(metric.replace("_", " "))
        seeds = max(len(runs) for runs in groups.values())
        title = f"mean and deviation over {seeds} seeds" if seeds > 1 else ""
        axes.set_title(f"{metric.replace('_', ' ')}{': ' * bool(title)}{title}")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return path


def draw_spread(run: Run, path: Path, metric: str) -> Path:
    """Every client's own value, sorted, with the mean and the worst tenth."""
    values = run.per_client.get(metric)
    if not values:
        known = ", ".join(run.per_client) or "nothing"
        raise ConfigurationError(
            f"{metric!r} was not evaluated per client; {known} was (see Evaluation(spread=...))"
        )
    worst_first = more_is_better(metric, directions(run.config, run.data))
    named = sorted(values.items(), key=lambda item: item[1], reverse=not worst_first)
    ordered = [value for _, value in named]
    tail = math.ceil(len(ordered) / 10)
    with picture(path) as (_, axes):
        colours = [COLOURS[1]] * tail + [COLOURS[0]] * (len(ordered) - tail)
        axes.bar(range(1, len(ordered) + 1), ordered, color=colours, width=0.9)
        mean = sum(ordered) / len(ordered)
        axes.axhline(mean, color="0.25", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"mean {mean:.3f}",
            (0, mean),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize="small",
        )
        if len(ordered) <= NAMED:
            names = [
                name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name, _ in named
            ]
            axes.set_xticks(range(1, len(ordered) + 1), names, rotation=45, ha="right")
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"{len(ordered)} clients, worst first (worst tenth in orange)")
        axes.set_ylabel(f"{metric.replace('_', ' ')} on own test data")
        axes.set_title(f"{_title(run)}: {metric.replace('_', ' ')} by client")
        axes.grid(axis="x", visible=False)
    return path


def draw_run(run: Run, folder: Path) -> list[Path]:
    """A run's figures: its main metric and the loss, against rounds and bytes, and the spread."""
    paths = []
    # Without test data there is still the loss that clients report.
    shown = dict.fromkeys((main_metric(run.metrics), "loss")) if run.metrics else ["train_loss"]
    for metric in shown:
        if not any(metric in r.metrics or metric in r.measurements for r in run.history):
            continue
        for against in ("round", "bytes"):
            name = f"{metric}.png" if against == "round" else f"{metric}-{against}.png"
            paths.append(draw_metric({"": run}, folder / name, metric, against))
    for metric in run.per_client:
        paths.append(draw_spread(run, folder / f"spread-{metric}.png", metric))
    return paths


def _title(run: Run) -> str:
    """The data's name, in which a dollar is a dollar and begins no formula."""
    return str(run.data.get("name", "")).replace("$", r"\$")


def _places(run: Run, rounds: list[int], against: str) -> list[float]:
    if against == "round":
        return [float(round) for round in rounds]
    if against == "seconds":
        clock = {record.round: record.clock for record in run.history}
        return [clock[round] for round in rounds]
    totals = accumulate(record.bytes_up + record.bytes_down for record in run.history)
    spent = {r.round: total / 1e6 for r, total in zip(run.history, totals, strict=True)}
    return [spent[round] for round in rounds]


def _draw_spread(
    axes: Any, run: Run, metric: str, against: str, colour: str, labelled: bool
) -> bool:
    """The band of one deviation around the mean over clients; returns whether there is one."""
    rounds, low, high = [], [], []
    for record in run.history:
        mean = record.metrics.get(f"{metric}_client_mean")
        if mean is not None:
            deviation = record.metrics[f"{metric}_client_std"]
            rounds.append(record.round)
            low.append(mean - deviation)
            # A share cannot be above 1, whatever the deviation.
            high.append(min(mean + deviation, 1.0) if metric in SHARES else mean + deviation)
    if len(rounds) > 1:
        axes.fill_between(
            _places(run, rounds, against),
            low,
            high,
            color=colour,
            alpha=0.15,
            linewidth=0,
            label="clients: mean ± 1 deviation" if labelled else None,
        )
    return len(rounds) > 1
