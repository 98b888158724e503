"""FedProx's synthetic data (Li et al., MLSys 2020, figures 1 and 2): what the proximal term does.

Multinomial logistic regression, 30 clients, 10 per round, 20 epochs of batch 10 at rate 0.01, as in
the paper. Two questions: does mu = 1 help as data grow heterogeneous and hurt on IID data, and what
do 90 % stragglers do to FedAvg, which drops them, and to FedProx, which keeps their partial work?

    python benchmarks/fedprox_synthetic.py [--rounds 100] [--out benchmarks/results/fedprox.json]
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SETS: dict[str, dict[str, Any]] = {
    "IID": {"alpha": 0.0, "beta": 0.0, "iid": True},
    "(0, 0)": {"alpha": 0.0, "beta": 0.0},
    "(0.5, 0.5)": {"alpha": 0.5, "beta": 0.5},
    "(1, 1)": {"alpha": 1.0, "beta": 1.0},
}
#: name: (mu, share of stragglers, keep partial work)
METHODS = {
    "mu=0": (0.0, 0.0, False),
    "mu=1": (1.0, 0.0, False),
    "FedAvg, 90 % stragglers dropped": (0.0, 0.9, False),
    "mu=0, 90 % stragglers kept": (0.0, 0.9, True),
    "mu=1, 90 % stragglers kept": (1.0, 0.9, True),
}


def run(case: tuple[str, str, int, int]) -> dict[str, Any]:
    """Training loss over all clients and test accuracy after every round of one setting."""
    set_name, method, rounds, seed = case
    from threadpoolctl import threadpool_limits

    from atoll import Evaluation, Federation, algorithms, data, schedules
    from atoll.learners import NumpyLearner
    from atoll.learners.metrics import figures
    from atoll.simulation import Stragglers
    from atoll.tracking import Observer

    mu, share, partial = METHODS[method]
    clients = data.synthetic(**SETS[set_name], seed=seed)
    learner = NumpyLearner(layers=(60, 10), lr=0.01, batch_size=10, epochs=20, zero_init=True)
    losses: list[float] = []

    class TrainLoss(Observer):
        """The paper's y axis: loss over all training data."""

        def round(self, run: Any, end: Any) -> None:
            sums = learner.evaluate(run.model, clients.all_train(), "classification", 10)
            losses.append(figures(sums, "classification")["loss"])

    federation = Federation(
        learner=learner,
        algorithm=algorithms.FedProx(mu=mu) if mu else algorithms.FedAvg(),
        # A straggler is late by the deadline, or is given just the work it can do by then. The
        # paper's FedAvg averages whoever is left, so a round goes on with a single update.
        schedule=schedules.Synchronous(
            rounds=rounds,
            cohort=10,
            deadline=1.0 + 1e-6,
            minimum=1,
            adaptive=partial,
            attempts=1000,
            pause=0.0,
        ),
        evaluation=Evaluation(clients_every=None),
    )
    devices = Stragglers(share=share, epochs=20, seconds=1.0)
    with threadpool_limits(1):
        result = federation.simulate(clients, seed=seed, devices=devices, observers=[TrainLoss()])
    return {
        "data": set_name,
        "method": method,
        "seed": seed,
        "train_loss": [round(loss, 5) for loss in losses],
        "test_accuracy": [round(v, 5) for v in result.series("accuracy")[1]],
        "seconds": round(result.seconds, 1),
    }


def main() -> None:
    """Run all settings and write the results and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fedprox.json"))
    options = parser.parse_args()
    cases = [(d, m, options.rounds, s) for s in range(options.seeds) for d in SETS for m in METHODS]
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        for result in pool.map(run, cases):
            results.append(result)
            print(
                f"{result['data']:>10}  {result['method']:<32} seed {result['seed']}  "
                f"loss {result['train_loss'][-1]:.4f}  accuracy {result['test_accuracy'][-1]:.4f}  "
                f"{result['seconds']} s",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results) + "\n")
    draw(results, options.out.with_suffix(".png"))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The paper's layout: data sets in columns, without and with stragglers in rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    rows = figure.subplots(2, len(SETS), sharex=True)
    first = [r for r in results if r["seed"] == 0]
    for column, name in enumerate(SETS):
        for result in (r for r in first if r["data"] == name):
            axes = rows[int("stragglers" in result["method"])][column]
            axes.plot(result["train_loss"], label=result["method"], linewidth=1.3)
            axes.set_title(name)
            axes.set_ylim(0, 3)
            axes.set_xlabel("round")
    for axes in rows[:, 0]:
        axes.set_ylabel("training loss")
        axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
