"""The workloads: synthetic data, models, cohorts and reports that every contender shares.

    python benchmarks/speed/workloads.py          # writes the data once, about 0.9 GB

Data come from NumPy's generator with a fixed seed, so that contenders in other environments see the
same. A runner prints one line `BENCH {...}`; `measure.py` adds memory and processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

IMPORTED = time.time()

import numpy as np  # noqa: E402

DATA = Path(os.environ.get("ATOLL_BENCH_DATA", Path(__file__).parent / "data"))

#: clients, examples each, input shape, classes, cohort, epochs, batch, rate, rounds.
WORKLOADS: dict[str, dict[str, Any]] = {
    "W1": {"model": "cnn28", "clients": 200, "examples": "lognormal", "shape": (1, 28, 28),
           "classes": 62, "cohort": 10, "epochs": 1, "batch": 20, "rate": 0.1, "rounds": 14},
    "W2": {"model": "mlp", "clients": 100, "examples": 600, "shape": (784,),
           "classes": 10, "cohort": 10, "epochs": 5, "batch": 10, "rate": 0.1, "rounds": 10},
    "W3": {"model": "logistic", "clients": 1000, "examples": 50, "shape": (784,),
           "classes": 10, "cohort": 100, "epochs": 1, "batch": 10, "rate": 0.1, "rounds": 60},
    "W4": {"model": "cnn32", "clients": 1000, "examples": 50, "shape": (3, 32, 32),
           "classes": 10, "cohort": 50, "epochs": 1, "batch": 10, "rate": 0.1, "rounds": 7},
    "W5": {"model": "lstm", "clients": 100, "examples": 40, "shape": (80,),
           "classes": 90, "cohort": 10, "epochs": 1, "batch": 10, "rate": 0.5, "rounds": 7},
    "W6": {"model": "transformer", "clients": 100, "examples": 40, "shape": (64,),
           "classes": 90, "cohort": 10, "epochs": 1, "batch": 10, "rate": 0.1, "rounds": 20},
}  # fmt: skip
TOKENS = ("W5", "W6")


def generate(name: str) -> None:
    """Write inputs, targets and offsets of one workload."""
    w = WORKLOADS[name]
    rng = np.random.default_rng(0)
    if w["examples"] == "lognormal":
        sizes = np.exp(rng.normal(np.log(100) - 0.32, 0.8, w["clients"]))
        sizes = np.clip(np.round(sizes), 20, 400).astype(np.int64)
    else:
        sizes = np.full(w["clients"], w["examples"], np.int64)
    total = int(sizes.sum())
    if name in TOKENS:
        x, y = _texts(rng, total, w["shape"][0], w["classes"])
    else:
        x, y = _images(rng, total, w["shape"], w["classes"])
    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]))


def _images(
    rng: np.random.Generator, total: int, shape: tuple[int, ...], classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coarse prototypes of the classes under noise; a tenth of the labels are wrong."""
    channels, side = (shape[0], shape[1]) if len(shape) == 3 else (1, 28)
    coarse = rng.normal(0, 1, (classes, channels, side // 4, side // 4))
    prototypes = np.kron(coarse, np.ones((1, 1, 4, 4))).reshape(classes, -1)
    y = rng.integers(0, classes, total)
    x = rng.standard_normal((total, prototypes.shape[1]), dtype=np.float32) * np.float32(0.25)
    x += 0.10 * prototypes[y].astype(np.float32)
    wrong = rng.random(total) < 0.10
    y = np.where(wrong, rng.integers(0, classes, total), y)
    return x.reshape(total, *shape), y.astype(np.int64)


def _texts(
    rng: np.random.Generator, total: int, length: int, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Walks on a sparse Markov chain: the next token is worth predicting."""
    following = rng.integers(0, words, (words, 4))
    text = np.empty((total, length + 1), np.int64)
    text[:, 0] = rng.integers(0, words, total)
    for place in range(length):
        text[:, place + 1] = following[text[:, place], rng.integers(0, 4, total)]
    return text[:, :-1].copy(), text[:, 1:].copy()


class Data:
    """`client(i)` is (x, y); loaded once, or mapped and copied where a contender has processes."""

    def __init__(self, name: str, load: bool = True) -> None:
        folder, mode = DATA / name, None if load else "r"
        self.load = load
        self.x = np.load(folder / "x.npy", mmap_mode=mode)
        self.y = np.load(folder / "y.npy", mmap_mode=mode)
        self.offsets = np.load(folder / "offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def client(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self.offsets[number], self.offsets[number + 1]
        if self.load:
            return self.x[start:stop], self.y[start:stop]
        return np.array(self.x[start:stop]), np.array(self.y[start:stop])

    def probe(self, each: int = 5, most: int = 1000) -> tuple[np.ndarray, np.ndarray]:
        """A few examples of every client, on which losses are compared."""
        rows = np.concatenate([np.arange(a, a + each) for a in self.offsets[:-1]])[:most]
        return np.array(self.x[rows]), np.array(self.y[rows])


def cohort(name: str, round: int) -> np.ndarray:
    """Clients of a round, counted from 0; the same for every contender."""
    w = WORKLOADS[name]
    return np.random.default_rng(1000 + round).choice(w["clients"], w["cohort"], replace=False)


def make_model(name: str) -> Any:
    """The torch module, with the initial weights that every contender starts from."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    w = WORKLOADS[name]
    if w["model"] in ("cnn28", "cnn32"):
        channels, side = w["shape"][:2]
        flat = ((side - 4) // 2) ** 2 * 64
        return nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(),
            nn.Linear(128, w["classes"]),
        )  # fmt: skip
    if w["model"] == "mlp":
        return nn.Sequential(
            nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
        )
    if w["model"] == "logistic":
        return nn.Sequential(nn.Linear(784, 10))
    if w["model"] == "lstm":
        return _lstm(w["classes"])
    return _transformer(w["classes"], w["shape"][0])


def _lstm(words: int) -> Any:
    from torch import nn

    class Characters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(words, 8)
            self.body = nn.LSTM(8, 256, 2, batch_first=True)
            self.head = nn.Linear(256, words)

        def forward(self, x: Any) -> Any:
            return self.head(self.body(self.words(x))[0])

    return Characters()


def _transformer(words: int, length: int) -> Any:
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, 64), nn.Embedding(length, 64)
            layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(64, words)

        def forward(self, x: Any) -> Any:
            later = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
            hidden = self.words(x) + self.places(torch.arange(x.shape[1]))
            return self.head(self.body(hidden, mask=later, is_causal=True))

    return Transformer()


def loss_of(outputs: Any, targets: Any) -> Any:
    """Mean cross-entropy over labels or tokens."""
    import torch

    return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def probe_loss(model: Any, name: str) -> float:
    """Mean loss of a torch module on the probe, in slices that do not set the peak of memory."""
    import torch

    x, y = Data(name, load=False).probe()
    with torch.no_grad():
        total = sum(
            float(loss_of(model(torch.from_numpy(x[i : i + 50])), torch.from_numpy(y[i : i + 50])))
            * len(y[i : i + 50])
            for i in range(0, len(y), 50)
        )
    return total / len(y)


def arguments() -> argparse.Namespace:
    """What every runner takes; torch has so many threads from here on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--variant", default="")
    given = parser.parse_args()
    given.rounds = given.rounds or WORKLOADS[given.workload]["rounds"]
    if given.threads:
        import torch

        torch.set_num_threads(given.threads)
    return given


class Report:
    """Times the rounds of a runner and prints its line."""

    def __init__(self, name: str, given: argparse.Namespace, version: str = "") -> None:
        self._launched = float(os.environ.get("ATOLL_BENCH_LAUNCH", IMPORTED))
        self._name, self._given, self._version = name, given, version
        self._edges: list[float] = []

    def start(self) -> None:
        """Round one begins."""
        self._edges = [time.time()]

    def lap(self) -> None:
        """A round has ended."""
        self._edges.append(time.time())

    def done(self, after: float, before: float | None = None, **more: Any) -> None:
        """Print the figures; medians leave out two rounds for warming up.

        The loss before training is that of the shared initial weights, and found afterwards, so
        that nobody's start-up pays for it; those without torch give it.
        """
        if before is None:
            before = probe_loss(make_model(self._given.workload), self._given.workload)
        rounds = np.diff(self._edges)
        steady = rounds[2:] if len(rounds) > 4 else rounds
        figures = {
            "contender": self._name, "version": self._version, "workload": self._given.workload,
            "variant": self._given.variant, "threads": self._given.threads, "rounds": len(rounds),
            "seconds": round(float(np.median(steady)), 5), "fastest": round(float(min(steady)), 5),
            "first": round(float(rounds[0]), 4),
            "start_to_round_one": round(self._edges[1] - self._launched, 3),
            "loss_before": round(before, 4), "loss_after": round(after, 4), **more,
        }  # fmt: skip
        print("BENCH " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or WORKLOADS:
        print("writing", each)
        generate(each)
