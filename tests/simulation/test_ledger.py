"""The ledger: bytes that travel, against the safetensors library's own of the same arrays."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import safetensors.numpy as library

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.aggregation.stage import Stage
from atoll.learners import NumpyLearner
from atoll.simulation import Sequential
from atoll.tracking import Observer


@dataclass(frozen=True)
class Seen(Stage):
    """Lets every update pass, and keeps what passed."""

    passed: list

    def encode(self, update, told, memory, key):
        self.passed.append(update)
        return update, memory


class Ledger(Observer):
    def __init__(self):
        self.rounds = []

    def round(self, run, end):
        self.rounds.append(list(end.participants))


def under(folder, arrays):
    return {f"{folder}/{name}": array for name, array in arrays.items()}


def size_of(update):
    """Bytes of an update as the library writes it.

    Names stand in the sizes. Weight and metrics have 17 digits and one width, which leaves room for
    a sign and three digits of exponent.
    """
    arrays = under("vectors", update.vectors) | under("statistics", update.statistics)
    numbers = {"weight": update.weight} | under("metric", update.metrics)
    about = {name: f"{value:+.16e}".rjust(24) for name, value in numbers.items()}
    return len(library.save(arrays, about))


@pytest.mark.parametrize(
    ("algorithm", "names", "stages"),
    [
        (algorithms.FedAvg(), ["params"], ()),
        (algorithms.FedProx(mu=0.1, weighting="uniform"), ["params"], (Clip(0.5),)),
        (algorithms.Scaffold(), ["params", "control"], (Clip(0.5, only=("delta",)),)),
    ],
    ids=["fedavg", "clipped", "scaffold"],
)
def test_the_ledger_counts_the_bytes_of_the_library(blobs, federation, algorithm, names, stages):
    passed, ledger = [], Ledger()
    pipeline = Seen(passed) >> Mean()
    for stage in stages:
        pipeline = stage >> pipeline
    run = replace(federation, algorithm=algorithm, pipeline=pipeline).simulate(
        blobs, observers=[ledger], engine=Sequential(workers=1)
    )
    parts = [part for round in ledger.rounds for part in round]
    assert len(parts) == 6 * 4
    passed = passed[-len(parts) :]  # one of zeros went before, by which devices plan
    received = under("algorithm", {name: np.zeros(9, np.float32) for name in names})
    for part, update in zip(parts, passed, strict=True):
        assert part.down == len(library.save(received))
        assert part.up == size_of(update)
    for record, round in zip(run.history, ledger.rounds, strict=True):
        assert record.bytes_down == sum(part.down for part in round)
        assert record.bytes_up == sum(part.up for part in round)
    assert run.bytes_up == sum(part.up for part in parts)
    assert run.bytes_down == sum(part.down for part in parts)


def test_statistics_are_counted_too():
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    clients = data.from_arrays(x, np.arange(40) % 3, classes=3).iid(clients=2)
    passed, ledger = [], Ledger()
    Federation(
        learner=TorchLearner(module, lr=0.1, batch_size=10),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
        pipeline=Seen(passed) >> Mean(),
    ).simulate(clients, observers=[ledger], engine=Sequential(workers=1))
    statistics = {"buffers": np.zeros(6, np.float32), "counters": np.zeros(1, np.int64)}
    params = {"params": np.zeros(6 + 3 + 3 + 3, np.float32)}
    model = under("algorithm", params) | under("statistics", statistics)
    for part, update in zip(ledger.rounds[0], passed[-2:], strict=True):
        # Arrays in another order: offsets of other digits, in headers of whole words.
        assert abs(part.down - len(library.save(model))) <= 8
        assert abs(part.up - size_of(update)) <= 8
        assert {name: v.dtype for name, v in update.statistics.items()} == {
            name: v.dtype for name, v in statistics.items()
        }


def test_a_larger_model_costs_four_bytes_a_parameter():
    def down(width):
        x = np.zeros((20, width), np.float32)
        clients = data.from_arrays(x, np.arange(20) % 2, classes=2).iid(clients=2)
        run = Federation(
            learner=NumpyLearner(layers=(width, 2)),
            algorithm=algorithms.FedAvg(),
            schedule=schedules.Synchronous(rounds=1),
        ).simulate(clients)
        return run.bytes_down, run.bytes_up

    # 1,002 and 5,002 parameters, so headers of one length; two clients.
    few, many = down(500), down(2500)
    assert [m - f for m, f in zip(many, few, strict=True)] == [2 * 4 * 4000] * 2
