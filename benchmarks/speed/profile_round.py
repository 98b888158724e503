"""Where the milliseconds of a round go: W1 and W3, by part, against what the machine could do.

    python benchmarks/speed/profile_round.py W3

Parts are timed by wrapping functions, in runs of their own, so that they add up to a round; those
marked with > are inside the part above them.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from workloads import WORKLOADS, Data, cohort, make_model

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.aggregation import mean
from atoll.backends import stacks, work
from atoll.learners import TorchLearner
from atoll.learners.torch import learner
from atoll.learners.torch.stacking import cohort as training
from atoll.learners.torch.stacking import layers, steps, tape
from atoll.rounds import coordinator, server
from atoll.simulation import simulator

SECONDS: dict[str, float] = defaultdict(float)
ROUNDS = {"W1": 6, "W3": 100}
ENGINES = {"W1": "sequential(workers=1, threads=1)", "W3": "stacked(block=100, workers=1)"}
PARTS = {
    "W3": [
        ("open the round, draw the cohort", coordinator.Coordinator, "open"),
        ("make the tasks", simulator.Simulator, "_task"),
        ("train the stack", learner, "train_cohort"),
        ("> shuffle", training, "batches"),
        ("> gather inputs", training.Columns, "take"),
        ("> loss", steps, "cohort_loss"),
        ("> backward and update", tape.Tape, "back"),
        ("check and exact sum", learner, "fold"),
        ("make rows and states", stacks, "_states"),
        ("note the answers", simulator._Attempt, "note"),
        ("server's step", server.Server, "close"),
    ],
    "W1": [
        ("train the clients", learner, "train_cohort"),
        ("> convolutions, forward", layers, "convolution"),
        (
            "> convolutions, backward",
            sys.modules["atoll.learners.torch.stacking.layers.convolution"].aten,
            "convolution_backward",
        ),
        ("> pooling, forward", layers, "max_pool"),
        ("> dense, forward", layers, "linear"),
        ("> loss", steps, "cohort_loss"),
        ("> whole backward and update", tape.Tape, "back"),
        ("exact sum", mean._RunningMean, "add"),
        ("server's step", server.Server, "close"),
    ],
}


def wrap(label: str, owner: Any, name: str) -> None:
    """Add the time of every call to `SECONDS[label]`."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def timed(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*given, **named)
        finally:
            SECONDS[label] += time.perf_counter() - started

    setattr(owner, name, timed)


@dataclass(frozen=True)
class Given:
    workload: str

    def draw(self, roster: Any, count: int, round: int, key: Any) -> np.ndarray:
        return np.sort(cohort(self.workload, round - 1))


def main() -> None:
    name = sys.argv[1]
    w, held = WORKLOADS[name], Data(name)
    clients = data.from_columns(held.x, held.y, held.offsets, classes=w["classes"])
    plan = Federation(
        learner=TorchLearner(
            make_model(name), lr=w["rate"], batch_size=w["batch"], epochs=w["epochs"],
            weights="given",
        ),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(
            rounds=ROUNDS[name], cohort=w["cohort"], selection=Given(name)
        ),
        evaluation=Evaluation(every=10**6, clients_every=None),
    )  # fmt: skip
    engine = ENGINES[name]
    plan.simulate(clients, engine=engine)
    started = time.perf_counter()
    plan.simulate(clients, engine=engine)
    whole = (time.perf_counter() - started) / ROUNDS[name]
    for label, owner, function in PARTS[name]:
        wrap(label, owner, function)
    work.together = stacks.together
    plan.simulate(clients, engine=engine)
    print(f"{name}: {whole * 1e3:.2f} ms a round, {engine}, torch {torch.__version__}")
    for label, _, _ in PARTS[name]:
        print(f"  {label:<34} {SECONDS[label] / ROUNDS[name] * 1e3:8.2f} ms")


if __name__ == "__main__":
    main()
