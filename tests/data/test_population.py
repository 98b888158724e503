"""Populations of any size."""

import subprocess
import sys

import numpy as np
import pytest

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.data import Examples
from atoll.errors import DataError
from atoll.learners import NumpyLearner


def make(client, rng):
    y = rng.integers(0, 3, 5)
    return (rng.normal(size=(5, 4)) + y[:, None]).astype(np.float32), y


def population(clients=1000):
    return data.generated(make, clients=clients, examples=5, classes=3, seed=1)


def plan(rounds=2, cohort=10):
    return Federation(
        learner=NumpyLearner(layers=(4, 3), batch_size=5),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=rounds, cohort=cohort),
        evaluation=Evaluation(clients_every=None),
    )


def test_a_generated_population_is_a_function_of_the_clients_keys():
    clients = population()
    x, _ = clients.train(7).all()
    again, _ = population(8).train(7).all()
    np.testing.assert_array_equal(x, again)
    assert not np.array_equal(x, clients.train(8).all()[0])
    assert len(clients) == 1000 and clients.names[7] == "7" and clients.index("7") == 7
    assert clients.size(3) == 5 and clients.sizes().sum() == 5000
    assert clients.summary()["train_examples"] == 5000
    assert len(clients.test(0)) == 0 and len(clients.tested()) == 0
    assert clients.digest() == population().digest() != population(999).digest()


def test_it_trains_like_the_same_data_held_in_arrays(tmp_path):
    clients = population(40)
    held = data.from_clients(
        {str(c): clients.train(c).all() for c in range(40)}, classes=3, test=0.0
    )
    runs = [plan().simulate(each, seed=2) for each in (clients, held)]
    assert runs[0].model["params"].tobytes() == runs[1].model["params"].tobytes()
    kept = plan().simulate(clients, seed=2, folder=tmp_path / "run")
    assert kept.model["params"].tobytes() == runs[0].model["params"].tobytes()


def test_columns_may_be_mapped_from_files(tmp_path):
    clients = population(40)
    parts = [clients.train(c).all() for c in range(40)]
    np.save(tmp_path / "x.npy", np.concatenate([x for x, _ in parts]))
    np.save(tmp_path / "y.npy", np.concatenate([y for _, y in parts]))
    x, y = (np.load(tmp_path / f"{name}.npy", mmap_mode="c") for name in "xy")
    mapped = data.from_columns(x, y, np.arange(0, 201, 5), classes=3)
    runs = [plan().simulate(each, seed=2) for each in (clients, mapped)]
    assert runs[0].model["params"].tobytes() == runs[1].model["params"].tobytes()
    assert mapped.train_rows[3].tolist() == [15, 16, 17, 18, 19]
    assert [rows[0] for rows in mapped.train_rows[1:3]] == [5, 10]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"offsets": [0, 5, 3]}, "offsets must go"),
        ({"offsets": [0, 500]}, "offsets must go"),
        ({"offsets": [1, 5]}, "offsets must go"),
        ({"x": np.zeros((9, 2))}, "inputs are float64"),
        ({"y": np.zeros(9, np.int32)}, "targets are int32"),
        ({"y": np.zeros(8, np.int64)}, "9 inputs but 8 targets"),
        ({"classes": None}, "say how many classes"),
        ({"offsets": [0, 5, 5]}, "client '1' of|client '1' has no training examples"),
    ],
)
def test_columns_that_do_not_fit_are_refused(given, match):
    good = {"x": np.zeros((9, 2), np.float32), "y": np.zeros(9, np.int64), "offsets": [0, 5, 9]}
    settings = {"classes": 2, **{k: v for k, v in given.items() if k == "classes"}}
    arrays = {**good, **{k: v for k, v in given.items() if k != "classes"}}
    with pytest.raises(DataError, match=match):
        data.from_columns(arrays["x"], arrays["y"], arrays["offsets"], **settings)


def test_a_maker_that_breaks_its_promise_is_told():
    clients = data.generated(make, clients=3, examples=6, classes=3)
    with pytest.raises(DataError, match="promised 6 inputs of shape"):
        clients.train(0)
    with pytest.raises(DataError, match="one client at a time"):
        population().all_train()


def test_part_of_a_generated_population_is_the_same_clients():
    few = population().subset([7, 3]).subset([1, 0])
    assert few.names == ("3", "7") and few.sizes().tolist() == [5, 5]
    np.testing.assert_array_equal(few.train(1).x, population().train(7).x)
    assert "2 clients hold 10 training examples" in str(few)


def test_names_are_numbers_and_nothing_else():
    names = population().names
    assert names[-1] == "999" and list(names[2:4]) == ["2", "3"] and "1000" not in names
    assert sum(1 for _ in names) == 1000
    for wrong in ("01", "x", "-1", "1000"):
        with pytest.raises(DataError, match="has no client"):
            population().index(wrong)


def test_examples_without_rows_join_too():
    x, y = np.zeros((3, 2), np.float32), np.zeros(3, np.int64)
    from atoll.data.examples import joined

    whole = joined([Examples(x, y), Examples(x, y, np.array([2]))])
    assert len(whole) == 4 and whole.x is x
    other = joined([Examples(x, y), Examples(x.copy(), y)])
    assert len(other) == 6


MILLION = """
import resource, sys, time
import numpy as np
import torch
from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.learners import TorchLearner
torch.set_num_threads(1)

def make(client, rng):
    y = rng.integers(0, 10, 20)
    return rng.standard_normal((20, 784), dtype=np.float32), y

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clients = data.generated(make, clients=1_000_000, examples=20, classes=10)
seconds = []
for cohort in (500, 1000, 2000):
    plan = Federation(
        learner=TorchLearner(torch.nn.Linear(784, 10), lr=0.1, batch_size=10),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=3, cohort=cohort),
        evaluation=Evaluation(clients_every=None),
    )
    started = time.process_time()
    plan.simulate(clients)
    seconds.append((time.process_time() - started) / 3)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 2**20, *seconds)
"""


@pytest.mark.slow
def test_a_million_clients_cost_what_their_cohort_costs():
    pytest.importorskip("torch")
    out = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, check=True
    ).stdout.split()
    gigabytes, small, _, large = map(float, out)
    assert gigabytes < 1.0
    assert large / small < 8  # four times the clients
