"""The GPU suite: pfl-research's public CIFAR-10 benchmark with synthetic images of that shape.

1,626,442 parameters, 1,000 clients with 50 images, cohort 50, batch 10, one epoch, 1,500 rounds:
375,000 client steps. Needs a CUDA device; `--device cpu --rounds 2` shows that it runs.

    python benchmarks/gpu.py                       # stacks, float32, recorded steps
    python benchmarks/gpu.py --precision tf32 --block 50
    python benchmarks/gpu.py --processes 4         # four Ray actors that share the GPU
    python benchmarks/gpu.py --sweep               # blocks, precisions, processes; 20 rounds each
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.backends.backend import Engine
from atoll.data import FederatedData
from atoll.learners import TorchLearner
from atoll.simulation import RayCluster, Stacked
from atoll.tracking import Observer

PARAMETERS = 1_626_442
COHORT = 50


def population() -> FederatedData:
    """1,000 clients with 50 images of 3 x 32 x 32 each, held in arrays."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 50_000)
    prototypes = rng.normal(size=(10, 3 * 32 * 32)).astype(np.float32)
    x = rng.standard_normal((50_000, 3 * 32 * 32), dtype=np.float32) + 0.2 * prototypes[y]
    offsets = np.arange(0, 50_001, 50)
    return data.from_columns(x.reshape(-1, 3, 32, 32), y, offsets, classes=10, name="images")


def model() -> nn.Module:
    """The benchmark's network: two convolutions, pooling, two dense layers."""
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12_544, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS
    return network


class Laps(Observer):
    """Seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def round(self, run: object, end: object) -> None:
        self.seconds.append(end.seconds)  # type: ignore[attr-defined]


def engine_of(device: str, block: int, processes: int) -> Engine:
    """Stacks in this process, or in several that have equal shares of one GPU."""
    if processes == 1:
        return Stacked(block=block, workers=1)
    gpus = 1 / processes if device.startswith("cuda") else 0.0
    return RayCluster(method=Stacked(block=block), actors=processes, gpus=gpus)


def measure(
    clients: FederatedData, given: argparse.Namespace, block: int | None, precision: str,
    processes: int,
) -> dict:  # fmt: skip
    """Seconds per round, client steps per second and, of one process, its peak on the device."""
    block = block or -(-COHORT // processes)
    laps = Laps()
    if given.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run = Federation(
        learner=TorchLearner(
            model(), lr=0.1, batch_size=10, device=given.device, precision=precision
        ),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=given.rounds, cohort=COHORT),
        evaluation=Evaluation(every=10**6, clients_every=None),
    ).simulate(clients, engine=engine_of(given.device, block, processes), observers=[laps])
    wall = time.perf_counter() - started
    median = float(np.median(laps.seconds[2:] or laps.seconds))
    figures = {
        "block": block, "precision": precision, "processes": processes, "rounds": given.rounds,
        "wall_s": round(wall, 2),
        "seconds_per_round": round(median, 5), "client_steps_per_s": round(250 / median, 1),
        "engine": run.engine, "train_loss": round(run.history[-1].measurements["train_loss"], 4),
    }  # fmt: skip
    if given.device.startswith("cuda") and processes == 1:
        figures["peak_device_mb"] = torch.cuda.max_memory_allocated() // 2**20
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=1500)
    parser.add_argument("--block", type=int, help="clients in a stack; default: all, shared evenly")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    clients = population()
    found = []
    if given.sweep:
        given.rounds = min(given.rounds, 20)
        for precision in ("float32", "tf32", "bfloat16"):
            for block in (1, 5, 10, 25, 50):
                found.append(measure(clients, given, block, precision, 1))
        for processes in (2, 4):
            found.append(measure(clients, given, None, "float32", processes))
    else:
        found.append(measure(clients, given, given.block, given.precision, given.processes))
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    if given.out:
        given.out.write_text(json.dumps({"device": name, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
