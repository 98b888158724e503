"""McMahan et al. (AISTATS 2017), table 2: rounds to a target accuracy on MNIST.

100 clients, IID or 2-class shards, 10 % per round, batch 10. Learning rates come from a small grid
for the 2NN and are fixed for the CNN; each cell of the table keeps its best. Needs ATOLL_DATA with
`mnist-writers` for the full MNIST. The paper's setting is all 60,000 images, 97 % for the 2NN and
99 % for the CNN; here the CNN has 10,000 images, 2,000 test images and 95 % to reach, so that two
cores can do it.

    python benchmarks/mcmahan_mnist.py 2nn
    python benchmarks/mcmahan_mnist.py cnn --images 10000 --target 0.95
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

EPOCHS = {"FedSGD": 0, "FedAvg E=1": 1, "FedAvg E=5": 5, "FedAvg E=20": 20}
RATES = {
    "2nn": {"FedSGD": (0.2, 0.5), "FedAvg E=1": (0.05, 0.1, 0.2), "FedAvg E=5": (0.05, 0.1),
            "FedAvg E=20": (0.05, 0.1)},
    "cnn": {"FedSGD": (0.2,), "FedAvg E=1": (0.1,), "FedAvg E=5": (0.05,), "FedAvg E=20": (0.05,)},
}  # fmt: skip
SPLITS = ("IID", "2-class shards")
LIMITS = {
    "2nn": {"FedSGD": 3000, "FedAvg E=1": 1500, "FedAvg E=5": 600, "FedAvg E=20": 400},
    "cnn": {"FedSGD": 1000, "FedAvg E=1": 400, "FedAvg E=5": 200, "FedAvg E=20": 100},
}


class Reached(Exception):
    """The target was met, so the run can stop."""


def run(case: tuple[str, str, str, float, int, float]) -> dict[str, Any]:
    """Rounds until the target for one model, split, method and learning rate."""
    model, split, method, lr, images, target = case
    import numpy as np
    import torch
    from torch import nn

    from atoll import Evaluation, Federation, algorithms, data, schedules
    from atoll.data import Examples
    from atoll.learners import TorchLearner
    from atoll.tracking import Observer

    torch.set_num_threads(1)
    mnist = data.load("mnist")
    if images < len(mnist):
        mnist = mnist.take(np.random.default_rng(0).choice(len(mnist), images, replace=False))
        # Testing after every round must not cost more than training does.
        mnist = replace(mnist, test=Examples(*mnist.test.take(np.arange(2000))))
    if split == "IID":
        clients = mnist.iid(clients=100, test=0.0, seed=0)
    else:
        clients = mnist.shards(clients=100, per_client=2, test=0.0, seed=0)
    modules = {
        "2nn": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
            nn.Linear(200, 10),
        ),
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
        ),
    }  # fmt: skip
    best = [0.0]

    class Stop(Observer):
        def round(self, run: Any, end: Any) -> None:
            best[0] = max(best[0], end.record.metrics.get("accuracy", 0.0))
            if best[0] >= target:
                raise Reached

    rounds = LIMITS[model][method]
    federation = Federation(
        learner=TorchLearner(modules[model](), lr=lr, batch_size=10, epochs=max(EPOCHS[method], 1)),
        algorithm=algorithms.FedSGD(lr=lr) if method == "FedSGD" else algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=rounds, cohort=10),
        evaluation=Evaluation(clients_every=None, every=1),
    )
    stop = Stop()
    reached = None
    from time import perf_counter

    started = perf_counter()
    seen: list[int] = []

    class Count(Observer):
        def round(self, run: Any, end: Any) -> None:
            seen.append(end.record.round)

    try:
        federation.simulate(clients, seed=0, observers=[Count(), stop])
    except Reached:
        reached = seen[-1]
    return {
        "model": model, "images": images, "target": target,
        "split": split, "method": method, "lr": lr, "rounds": reached,
        "limit": rounds, "best_accuracy": round(best[0], 4),
        "seconds": round(perf_counter() - started, 1),
    }  # fmt: skip


def main() -> None:
    """Run all cells of one model's table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("2nn", "cnn"))
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--split", choices=SPLITS, action="append")
    parser.add_argument("--method", choices=list(EPOCHS), action="append")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path(f"benchmarks/results/mcmahan-{options.model}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    cases = [
        (options.model, split, method, lr, options.images, options.target)
        for split in options.split or SPLITS
        for method in options.method or EPOCHS
        for lr in RATES[options.model][method]
    ]
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        for result in pool.map(run, cases):
            results.append(result)
            print(json.dumps(result), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
