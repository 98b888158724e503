"""One federation in five forms: NumPy, torch, JAX, Keras and scikit-learn.

KERAS_BACKEND=jax python benchmarks/frameworks.py

The digits, held by twenty clients with skewed labels; a network of 64-32-10 with ReLU, plain SGD of
rate 0.1 in batches of ten, two local epochs; FedAvg over ten clients a round, 30 rounds. Each form
draws its first weights by its framework's own habit, so that accuracies agree up to the noise of
seeds, which the table shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from flax import nnx
from sklearn.neural_network import MLPClassifier
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import (
    JaxLearner,
    KerasLearner,
    Learner,
    NumpyLearner,
    SklearnLearner,
    TorchLearner,
)
from atoll.learners.jax import nnx as from_nnx

HERE = Path(__file__).resolve().parent
SEEDS = 5
LOCAL = {"lr": 0.1, "batch_size": 10, "epochs": 2}


class Net(nnx.Module):
    """The network in Flax NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def numpy_form() -> Learner:
    return NumpyLearner(layers=(64, 32, 10), **LOCAL)


def torch_form() -> Learner:
    return TorchLearner(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), **LOCAL)


def jax_form() -> Learner:
    return JaxLearner(from_nnx(Net), **LOCAL)


def keras_form() -> Learner:
    layers = keras.layers
    stack = [keras.Input((64,)), layers.Dense(32, activation="relu"), layers.Dense(10)]
    return KerasLearner(keras.Sequential(stack), **LOCAL)


def sklearn_form() -> Learner:
    estimator = MLPClassifier(
        (32,), solver="sgd", learning_rate_init=0.1, momentum=0.0, batch_size=10, alpha=0.0
    )
    return SklearnLearner(estimator, features=64, classes=10, epochs=2)


FORMS: dict[str, Callable[[], Learner]] = {
    "NumPy": numpy_form, "torch": torch_form, "JAX (Flax NNX)": jax_form,
    f"Keras on {keras.backend.backend()}": keras_form, "scikit-learn": sklearn_form,
}  # fmt: skip


def main() -> None:
    """Run every form with every seed and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "results" / "frameworks.json")
    options = parser.parse_args()
    clients = data.load("digits").dirichlet(clients=20, alpha=0.3, seed=0)
    rows = []
    for name, make in FORMS.items():
        learner = make()
        federation = Federation(
            learner=learner,
            algorithm=algorithms.FedAvg(),
            schedule=schedules.Synchronous(rounds=30, cohort=10),
        )
        started = time.perf_counter()
        found = [federation.simulate(clients, seed=s).metrics["accuracy"] for s in range(SEEDS)]
        row = {
            "form": name, "parameters": learner.layout.size,
            "accuracy": round(statistics.mean(found), 4),
            "deviation": round(statistics.stdev(found), 4),
            "seconds per run": round((time.perf_counter() - started) / SEEDS, 2),
        }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    versions = {n: metadata.version(n) for n in ("torch", "jax", "flax", "keras", "scikit-learn")}
    about = {
        "date": str(date.today()), "cores": os.cpu_count(), "machine": platform.processor(),
        "seeds": SEEDS, **versions,
    }  # fmt: skip
    options.out.write_text(json.dumps({"about": about, "forms": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
