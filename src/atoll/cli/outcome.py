"""Reports of runs on the terminal."""

from __future__ import annotations

from atoll.cli.tables import console, figure, print_table
from atoll.learners.metrics import main_metric
from atoll.simulation.baselines import Baselines
from atoll.tracking.record import Run, human_bytes, human_seconds


def print_run(run: Run) -> None:
    """A run's outcome: its metrics, who took part, what it cost, what went wrong."""
    if not run.history:
        console().print("no round has closed yet")
        return
    last = run.history[-1]
    rows = [(name.replace("_", " "), figure(value)) for name, value in run.metrics.items()]
    rows.append(("rounds", f"{last.round} of {run.rounds}"))
    rows.append(("sent by clients", human_bytes(run.bytes_up)))
    rows.append(("received by clients", human_bytes(run.bytes_down)))
    if last.clock and not run.served:
        rows.append(("simulated time", human_seconds(last.clock)))
    rows.append(("real time", human_seconds(run.seconds)))
    retried = sum(record.attempts - 1 for record in run.history)
    if retried:
        rows.append(("abandoned attempts", str(retried)))
    missing = sum(record.invited - record.accepted for record in run.history)
    if missing:
        rows.append(("invited but not averaged", str(missing)))
    print_table(("", ""), rows, str(run.data.get("name", "")))
    if run.served:
        _print_sites(run)
    for reason in run.refusals[:5]:
        console().print(f"  {reason}", style="dim")
    if len(run.refusals) > 5:
        console().print(f"  and {len(run.refusals) - 5} more refusals", style="dim")


def _print_sites(run: Run) -> None:
    """How good the last model that sites measured is at each of them."""
    names = [name for name in run.per_client if not name.endswith("_count")]
    sites = dict.fromkeys(site for values in run.per_client.values() for site in values)
    if not sites:
        return
    rows = [
        (
            site,
            *(figure(run.per_client[n][site]) if site in run.per_client[n] else "" for n in names),
        )
        for site in sites
    ]
    heads = (name.replace("_", " ") for name in names)
    print_table(("on rows of its own", *heads), rows)


def print_comparison(run: Run, baselines: Baselines) -> None:
    """Federated against local-only and centralised training."""
    metric = main_metric(run.metrics)
    own = run.metrics.get(f"{metric}_client_mean")
    traffic = human_bytes(run.bytes_up + run.bytes_down)
    rows = [
        ("each client alone", baselines.local.pooled, baselines.local.own.get(metric), "nothing"),
        ("federated", run.metrics, own, f"{traffic} of models"),
        (
            "all data in one place",
            baselines.central.pooled,
            baselines.central.own.get(metric),
            "all data",
        ),
    ]
    print_table(
        (
            "training",
            f"{metric}, everyone's test data",
            "loss",
            f"{metric}, own test data",
            "shared",
        ),
        [
            (name, figure(pooled.get(metric)), figure(pooled.get("loss")), figure(mine), shared)
            for name, pooled, mine, shared in rows
        ],
    )
