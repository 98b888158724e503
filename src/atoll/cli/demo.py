"""`atoll demo`: handwritten digits, twenty clients that each know only some of them."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from atoll.algorithms import FedAvg
from atoll.cli.outcome import print_comparison
from atoll.cli.tables import console
from atoll.data.catalogue import load
from atoll.errors import MissingPackage
from atoll.federation import Federation
from atoll.learners.numpy import NumpyLearner
from atoll.rounds.schedules import Synchronous
from atoll.tracking.folder import RunFolder, new_folder
from atoll.tracking.progress import progress
from atoll.tracking.record import human_seconds
from atoll.view.plots import draw_metric


def run(options: argparse.Namespace) -> int:
    """Train federated, alone and centrally on the same split of real data, and compare."""
    clients = load("digits").dirichlet(clients=20, alpha=0.3, seed=options.seed)
    federation = Federation(
        learner=NumpyLearner(layers=(64, 64, 10), lr=0.1, batch_size=10, epochs=2),
        algorithm=FedAvg(),
        schedule=Synchronous(rounds=60, cohort=10),
    )
    out = console()
    out.print(
        "1,797 handwritten digits (scikit-learn), held by 20 clients who each see mostly a few of "
        "the ten.\nThey train one model together; only model updates leave a client.\n"
    )
    out.print(str(clients) + "\n")
    folder = new_folder(Path(options.runs), "demo")
    result = federation.simulate(
        clients, seed=options.seed, folder=RunFolder(folder), observers=[progress()]
    )
    out.print("\nthe same model, trained by each client alone and on all data in one place ...\n")
    baselines = federation.baselines(clients, seed=options.seed, folder=folder)
    print_comparison(result, baselines)
    with contextlib.suppress(MissingPackage):
        clients.plot(folder / "figures" / "clients.png")
        draw_metric(
            {"federated": result},
            folder / "figures" / "demo.png",
            "accuracy",
            levels={
                "each client alone": baselines.local.pooled["accuracy"],
                "all data in one place": baselines.central.pooled["accuracy"],
            },
        )
        out.print(f"\npicture: {folder / 'figures' / 'demo.png'}")
    out.print(f"run folder: {folder}  (trained in {human_seconds(result.seconds)})")
    out.print(f"look closer: atoll show {folder} --web, or atoll report {folder}")
    return 0
