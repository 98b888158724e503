import numpy as np
import pytest

from atoll import data
from atoll.data import Dataset, Examples
from atoll.errors import DataError


def blobs(n=100):
    rng = np.random.default_rng(0)
    return data.from_arrays(rng.normal(size=(n, 3)), rng.integers(0, 4, n), classes=4, name="blobs")


def test_train_and_test_parts_hold_every_example_once():
    clients = blobs().dirichlet(clients=7, alpha=0.5, test=0.25, seed=1)
    rows = [*clients.train_rows, *clients.test_rows]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(100))
    assert len(clients.test_part) == sum(map(len, clients.test_rows))
    assert clients.sizes().sum() == clients.label_distribution().sum()


def test_a_sets_own_test_part_is_the_global_one():
    own = Examples(np.ones((5, 3), np.float32), np.zeros(5, np.int64))
    dataset = Dataset("s", np.zeros((20, 3)), np.zeros(20, int), "classification", 2, test=own)
    clients = dataset.iid(clients=4)
    assert len(clients.test_part) == 5
    assert clients.test_part.all()[0].min() == 1


def test_columns_are_held_once():
    dataset = blobs()
    clients = dataset.iid(clients=10)
    assert clients.train(3).x is dataset.x


def test_partitions_depend_on_the_seed_alone():
    one, same, other = (blobs().dirichlet(clients=5, alpha=1, seed=seed) for seed in (1, 1, 2))
    assert one.digest() == same.digest() != other.digest()


def test_natural_clients_and_their_minimum():
    owners = np.array(["a"] * 5 + ["b"] * 2 + ["c"] * 9)
    dataset = Dataset(
        "s", np.zeros((16, 1)), np.zeros(16, int), "classification", 2, keys={"site": owners}
    )
    assert dataset.by("site").names == ("a", "b", "c")
    assert dataset.by(minimum=5).names == ("a", "c")
    with pytest.raises(DataError, match="no key 'place'; it has site"):
        dataset.by("place")
    with pytest.raises(DataError, match="no site has 50"):
        dataset.by(minimum=50)


def test_from_clients_keeps_names_and_order():
    clients = data.from_clients(
        {"z": (np.ones((4, 2)), np.zeros(4, int)), "a": (np.zeros((2, 2)), np.ones(2, int))}, test=0
    )
    assert clients.names == ("z", "a")
    assert clients.train(0).all()[0].min() == 1
    assert clients.classes == 2


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        ([[1.0], [np.nan]], [0, 1], 2, "1 of 2 inputs hold NaN or infinity .first at row 1"),
        ([[1.0], [2.0]], [0, 5], 2, "labels go from 0 to 5, but 2 classes allow only 0 to 1"),
        ([[1.0], [2.0]], [-1, 0], 2, "labels go from -1"),
        ([[1.0]], [0, 1], 2, "1 inputs but 2 targets"),
        (np.zeros((0, 1)), np.zeros(0, int), 2, "there are no examples"),
        ([["a"], ["b"]], [0, 1], 2, "encode them as numbers"),
        ([[1.0], [2.0]], [0.5, 1.0], 2, "must be whole numbers"),
    ],
)
def test_bad_data_get_a_sentence(x, y, classes, message):
    with pytest.raises(DataError, match=message):
        Dataset("bad", np.array(x), np.array(y), "classification", classes)


def test_regression_targets_must_be_finite():
    with pytest.raises(DataError, match="targets hold NaN"):
        Dataset("bad", np.zeros((2, 1)), np.array([0.0, np.inf]), "regression")


def test_an_empty_client_is_refused_by_name():
    with pytest.raises(DataError, match="client 'b': there are no examples"):
        data.from_clients({"a": (np.ones((2, 1)), np.zeros(2)), "b": (np.ones((0, 1)), [])})
    full = blobs().iid(clients=2)
    with pytest.raises(DataError, match="client '1' has no training examples"):
        data.FederatedData(
            "x", "classification", 4, (), full.names, full.x, full.y,
            (full.train_rows[0], np.zeros(0, np.int64)), full.test_rows, full.test_part,
        )  # fmt: skip


def test_synthetic_follows_the_published_generator():
    clients = data.synthetic(0.5, 0.5, clients=200, largest=None, seed=3)
    totals = np.array(
        [len(a) + len(b) for a, b in zip(clients.train_rows, clients.test_rows, strict=True)]
    )
    assert totals.min() >= 50
    # log(n - 50) ~ Normal(4, 2) before rounding down: the median is e^4 + 50.
    assert np.median(totals) == pytest.approx(np.exp(4) + 50, rel=0.35)
    # Inputs of one client have covariance diag(j^-1.2) around a client's own mean.
    largest = int(totals.argmax())
    x = clients.train(largest).all()[0]
    np.testing.assert_allclose(x.var(axis=0), np.arange(1, 61) ** -1.2, rtol=0.25)


def test_synthetic_iid_shares_one_model():
    clients = data.synthetic(iid=True, clients=5, seed=0)
    x, y = clients.all_train().all()
    assert abs(x.mean(axis=0)).max() < 0.1
    # One linear model explains all labels: multinomial regression fits far better than chance.
    linear = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=100.0, max_iter=1000)
    assert linear.fit(x, y).score(x, y) > 0.9


def test_population_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    for clients in (blobs().iid(clients=4), data.synthetic(clients=80)):
        path = clients.plot(tmp_path / f"{clients.name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
