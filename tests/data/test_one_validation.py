"""One validation for every source: what cannot be meant is refused, with client and row named."""

import datetime
import math

import numpy as np
import pytest

from atoll import data
from atoll.errors import DataError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
Y = (X[:, 0] > 0).astype(int)
TEXT = np.array(["no", "yes"])[Y]
A, B = slice(0, 20), slice(20, 40)


def by_clients(x, y, **settings):
    return data.from_clients({"a": (x[A], y[A]), "b": (x[B], y[B])}, **settings)


def by_torch(x, y, **settings):
    torch = pytest.importorskip("torch")

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(y)

        def __getitem__(self, at):
            return torch.tensor(x[at]), y[at]

    return data.from_torch(Pairs(), **settings)


def by_tensors(x, y, **settings):
    torch = pytest.importorskip("torch")
    tensors = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return data.from_torch(tensors, **settings)


SOURCES = {
    "arrays": data.from_arrays,
    "clients": by_clients,
    "torch": by_torch,
    "tensors": by_tensors,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("task", [None, "classification"])
def test_labels_in_a_column_are_labels(source, task):
    held = source(X, Y[:, None], task=task)
    assert held.task.name == "classification"
    assert held.classes == 2
    np.testing.assert_array_equal(held.y, Y)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_one_hot_labels_are_told_what_they_are(source):
    with pytest.raises(DataError, match=r"one-hot, \[N, 2\]; give y.argmax\(1\)"):
        source(X, np.eye(2)[Y])


def test_columns_of_text_and_of_a_test_part_are_flattened_too():
    held = data.from_arrays(X, TEXT[:, None], test=(X, TEXT[:, None]))
    assert held.class_names == ("no", "yes")
    np.testing.assert_array_equal(held.test.all()[1], Y)


def test_other_tasks_keep_their_columns():
    assert data.from_arrays(X, X[:, :1]).y.shape == (40, 1)
    assert data.from_arrays(X, Y[:, None], task="multilabel").y.shape == (40, 1)
    assert data.from_arrays(X, Y[:, None], task="regression").y.shape == (40, 1)


def test_clients_with_text_labels_share_their_names():
    held = data.from_clients({"a": (X[:2], ["no", "no"]), "b": (X[2:4], ["yes", "maybe"])}, test=0)
    assert held.class_names == ("maybe", "no", "yes")
    np.testing.assert_array_equal(held.y, [1, 1, 2, 0])


CLIENTS = {
    "one label too few": ({"a": (X[A], Y[:19]), "b": (X[B], Y[19:])}, "client 'a': 20 inputs"),
    "other widths": ({"a": (X[A], Y[A]), "b": (X[B, :2], Y[B])}, "client 'b': .*but .3. of 'a'"),
    "missing labels": ({"a": (X[A], [None] * 20)}, "client 'a': 20 of 20 targets are missing"),
    "pairs": ({"a": [(X[0], 1), (X[1], 0), (X[2], 1)]}, "client 'a': give a pair of arrays"),
    "a list": ([(X, Y)], "a dict of client names"),
    "text beside numbers": ({"a": (X[A], Y[A]), "b": (X[B], TEXT[B])}, "client 'b': the labels"),
    "other targets": ({"a": (X[A], X[A]), "b": (X[B], X[B, :2])}, "client 'b': targets have shape"),
    "names beside an array": ({"a": (X[A], Y[A]), "b": ({"x": X[B]}, Y[B])}, "client 'b': the in"),
    "names of one text": ({1: (X[A], Y[A]), "1": (X[B], Y[B])}, "the same name once it is text"),
    "nobody": ({}, "there are no clients"),
    "nothing": ({"a": (X[:0], Y[:0])}, "client 'a': there are no examples"),
    "numbers": ({"a": 3}, "client 'a': give a pair"),
}  # fmt: skip


@pytest.mark.parametrize(("held", "told"), CLIENTS.values(), ids=CLIENTS)
def test_clients_that_do_not_fit_are_named(held, told):
    with pytest.raises(DataError, match=told):
        data.from_clients(held)


def test_clients_may_be_numbered():
    held = data.from_clients({0: (X[A], Y[A]), 1: (X[B], Y[B])})
    assert held.names == ("0", "1")
    assert "20" in str(held) or "16" in str(held)


MISSING = [
    [None, "a", "b"] + ["a"] * 37,
    [math.nan] + [1.0] * 39,
    np.array(["NaT"] + ["2020-01-01"] * 39, "datetime64[D]"),
    [datetime.date(2020, 1, 1)] * 39 + [None],
]


@pytest.mark.parametrize("owners", MISSING, ids=["None", "NaN", "NaT", "dates"])
def test_missing_owners_become_nobodys_name(owners):
    with pytest.raises(DataError, match=r"1 of 40 owners of key 'h' are missing \(first at row"):
        data.from_arrays(X, Y, keys={"h": owners})


def test_ids_that_float32_cannot_hold_are_refused_and_named_ones_are_kept():
    ids = np.arange(1 << 24, (1 << 24) + 40)
    for negative in (ids, -ids):
        with pytest.raises(DataError, match="different ids would become one"):
            data.from_arrays(negative[:, None], Y)
    kept = data.from_arrays({"ids": ids}, Y)
    np.testing.assert_array_equal(kept.x["ids"], ids)
    exact = data.from_arrays(np.full((40, 1), 1 << 24), Y)
    assert exact.x.max() == 1 << 24
    assert data.from_arrays(RNG.integers(0, 256, (40, 2, 2), np.uint8), Y).x.dtype == np.float32


def test_ids_for_an_embedding_are_told_how():
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    class Net(torch.nn.Module):
        def __init__(self, long):
            super().__init__()
            self.long, self.words = long, torch.nn.Embedding(50, 8)
            self.out = torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.words(x.long() if self.long else x).mean(1))

    ids = RNG.integers(0, 50, (40, 7))
    held = data.from_arrays(ids, Y).iid(clients=2)
    with pytest.raises(DataError, match=r"begin the module with x.long\(\)"):
        TorchLearner(Net(False)).check(held)
    TorchLearner(Net(True)).check(held)
    TorchLearner(Net(False)).check(data.from_arrays({"x": ids}, Y).iid(clients=2))


def table(mark, decimals=1):
    pandas = pytest.importorskip("pandas")
    ages = [f"{value:.{decimals}f}" for value in RNG.normal(240, 50, 200)]
    ages[7] = mark
    return pandas.DataFrame({"age": ages, "ill": RNG.integers(0, 2, 200)})


@pytest.mark.parametrize("mark", ["?", "unknown", "-", "n.d.", "1.234,5", "1,5", ""])
@pytest.mark.parametrize("missing", ["refuse", "indicator"])
def test_a_mark_among_numbers_makes_no_categories(mark, missing):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"column 'age' is text, but .* numbers.*first at row 7"):
        data.from_table(table(mark), label="ill", missing=missing)


def test_codes_may_be_categories():
    pytest.importorskip("pyarrow")
    frame = table("?", decimals=0)
    frame["age"] = frame["age"].astype("category")
    assert data.from_table(frame, label="ill").shape[0] > 20
    frame["age"] = [str(value % 5) for value in range(199)] + ["unknown"]
    assert data.from_table(frame, label="ill").shape == (6,)


PARTITIONS = [
    ("iid", {"clients": True}, "clients must be a whole number"),
    ("iid", {"clients": 2.0}, "clients must be a whole number"),
    ("iid", {"clients": 0}, "clients must be a whole number"),
    ("iid", {"clients": 4, "seed": "x"}, "seed must be a whole number"),
    ("iid", {"clients": 4, "test": math.nan}, "test fraction must be"),
    ("iid", {"clients": 4, "test": "a"}, "test fraction must be"),
    ("dirichlet", {"clients": 4, "alpha": math.nan}, "alpha must be positive"),
    ("dirichlet", {"clients": 4, "alpha": 0}, "alpha must be positive"),
    ("dirichlet", {"clients": 4, "alpha": 5e-324}, "alpha must be 1e-12 or more"),
    ("dirichlet", {"clients": 4, "alpha": 5e-324, "balanced": True}, "alpha must be 1e-12"),
    ("dirichlet", {"clients": 4, "alpha": "1"}, "alpha must be positive"),
    ("dirichlet", {"clients": 4, "alpha": 1, "minimum": 1.5}, "minimum must be a whole number"),
    ("dirichlet", {"clients": 4, "alpha": 1, "minimum": -1}, "minimum must be a whole number"),
    ("shards", {"clients": 4, "per_client": 1.5}, "per_client must be a whole number"),
    ("lognormal", {"clients": 4, "sigma": math.inf}, "sigma must be"),
    ("lognormal", {"clients": -1}, "clients must be a whole number"),
    ("lognormal", {"clients": 4, "sigma": -1}, "sigma must be"),
    ("power_law", {"clients": 4, "exponent": math.nan}, "exponent must be"),
    ("power_law", {"clients": None}, "clients must be a whole number"),
    ("by", {"minimum": 1.5}, "minimum must be a whole number"),
]


@pytest.mark.parametrize(("kind", "settings", "told"), PARTITIONS)
def test_a_partition_that_means_nothing_is_refused(kind, settings, told):
    held = data.from_arrays(X, Y, keys={"h": np.arange(40) % 4})
    with pytest.raises(DataError, match=told):
        getattr(held, kind)(**settings)


@pytest.mark.parametrize("balanced", [False, True])
def test_an_infinite_alpha_is_the_papers_iid(balanced):
    y = np.arange(400) % 4
    held = data.from_arrays(np.zeros((400, 1)), y).dirichlet(
        clients=np.int64(4), alpha=math.inf, balanced=balanced, test=0
    )
    spread = held.label_distribution()
    np.testing.assert_array_equal(spread.sum(0), [100] * 4)
    assert spread.min() >= (10 if balanced else 25)


@pytest.mark.parametrize("kind", ["int64", "float64"])
def test_ids_that_float32_cannot_tell_apart_are_refused_wherever_they_stand(kind):
    pandas = pytest.importorskip("pandas")
    ids = (10**9 + np.arange(20)).astype(kind)
    told = "float32 is exact up to 16777216 only"
    table = pandas.DataFrame({"id": ids, "dose": np.arange(20.0), "ill": [0, 1] * 10})
    with pytest.raises(DataError, match=f"values of column 'id' hold different .*{told}"):
        data.from_table(table, label="ill")
    table.loc[3, "id"] = None
    with pytest.raises(DataError, match=told):
        data.from_table(table, label="ill", missing="indicator")
    with pytest.raises(DataError, match=told):
        data.from_table(table.assign(id=ids), label="id", features=["dose"], task="regression")
    with pytest.raises(DataError, match=told):
        data.from_arrays(np.arange(20.0)[:, None], ids, task="regression")
    with pytest.raises(DataError, match=told):
        data.from_arrays(ids[:, None], np.arange(20) % 2)
    # Amounts that stay apart, and fractions, which are rounded as ever.
    apart = table.assign(id=2.0**30 * np.arange(20))
    assert len(data.from_table(apart, label="ill").x) == 20
    assert len(data.from_table(table.assign(id=ids + 0.5), label="ill").x) == 20
