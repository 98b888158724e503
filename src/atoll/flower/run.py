"""Running an app: its server against our grid, kept and watched as any run is."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Context, RecordDict

from atoll.core.random import Key
from atoll.flower.apps import App
from atoll.flower.clients import Here, Workers
from atoll.flower.draws import seeded
from atoll.flower.grid import LocalGrid
from atoll.flower.watch import Watch
from atoll.tracking.observer import Observer
from atoll.tracking.record import Run


def run_app(
    app: App, *, seed: int = 0, workers: int = 1, observers: Sequence[Observer] = ()
) -> Run:
    """Run a Flower app on this machine, without Ray and without servers.

    Args:
        app: from `read_app`.
        seed: of every draw of the server and of each client that does not seed for itself.
        workers: how many clients work at the same time: 1 is in this process, more are processes
            of their own. The numbers are the same, unless clients keep things in globals.
        observers: what is told about each round, e.g. a `tracking.RunFolder`.

    Returns:
        The run: rounds with what clients and server measured, weighted as they say; bytes of the
        arrays and records that were exchanged; the final arrays of Flower's own strategies.
    """
    known = app.config.get("num-server-rounds", 0)
    run = Run(
        describe(app), {"name": app.name, "clients": app.clients}, seed,
        known if isinstance(known, int) else 0,
    )  # fmt: skip
    watch = Watch(run, observers)
    key = Key(seed).fold("flower")
    context = Context(1, 1, {}, RecordDict(), dict(app.config))
    clients = Workers(app, workers) if workers > 1 else Here(app)
    grid = LocalGrid(clients, app.clients, key, watch.message)
    try:
        with watch.listening(), seeded(key.fold("server")):
            app.server(grid, context)
            grid.settle()
        watch.end()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            watch.end()
        else:
            watch.interrupted()
            raise
    finally:
        grid.close()
        clients.close()
        for observer in observers:
            observer.close()
    return run


def describe(app: App) -> dict[str, object]:
    """The app in the form of a plan, so that its runs are listed and compared as all are."""
    server, client = app.references
    return {
        "kind": "flower app",
        "algorithm": {"kind": "flwr.ServerApp", "reference": server},
        "learner": {"kind": "flwr.ClientApp", "reference": client},
        "pipeline": [],
        "schedule": {"kind": "flwr.rounds", "rounds": app.config.get("num-server-rounds")},
        "evaluation": None,
        "run_config": dict(app.config),
    }
