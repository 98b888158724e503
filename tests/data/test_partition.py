import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll import data
from atoll.data import partition
from atoll.data.shift import add_noise, rotate
from atoll.errors import DataError


def rng(seed=0):
    return np.random.default_rng(seed)


def assert_complete(parts, examples):
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(examples))


sizes = st.integers(60, 200)
clients = st.integers(1, 20)
seeds = st.integers(0, 5)


@given(sizes, clients, seeds)
def test_iid_gives_every_row_once_and_evenly(examples, count, seed):
    parts = partition.iid(examples, count, rng(seed))
    assert_complete(parts, examples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(sizes, clients, st.floats(1e-4, 100), st.integers(1, 3), seeds)
def test_dirichlet_gives_every_row_once_and_nobody_too_little(examples, count, alpha, least, seed):
    labels = rng(seed).integers(0, 7, examples)
    parts = partition.dirichlet(labels, count, alpha, least, rng(seed))
    assert len(parts) == count
    assert_complete(parts, examples)
    assert min(map(len, parts)) >= least


@given(sizes, clients, st.floats(1e-4, 100), seeds)
def test_balanced_dirichlet_gives_every_row_once_and_evenly(examples, count, alpha, seed):
    labels = rng(seed).integers(0, 7, examples)
    parts = partition.balanced_dirichlet(labels, count, alpha, rng(seed))
    assert_complete(parts, examples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(sizes, clients, st.integers(1, 3), seeds)
def test_sized_gives_every_row_once_and_the_minimum(examples, count, least, seed):
    weights = rng(seed).lognormal(0, 2, count)
    parts = partition.sized(examples, weights, least, rng(seed))
    assert_complete(parts, examples)
    assert min(map(len, parts)) >= least


def test_dirichlet_marginals_have_the_theoretical_variance():
    # A share of Dirichlet(alpha * 1_N) has variance (N - 1) / (N^2 (N alpha + 1)).
    count, alpha = 10, 0.5
    shares = []
    for seed in range(300):
        parts = partition.dirichlet(np.zeros(2000, np.int64), count, alpha, 0, rng(seed))
        shares += [len(part) / 2000 for part in parts]
    assert np.var(shares) == pytest.approx((count - 1) / (count**2 * (count * alpha + 1)), rel=0.1)


def test_shards_give_mcmahans_two_classes_each():
    labels = np.repeat(np.arange(10), 6000)
    parts = partition.shards(labels, 100, 2, rng())
    assert_complete(parts, 60_000)
    assert {len(part) for part in parts} == {600}
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)


def test_power_law_sizes_follow_the_law():
    clients = data.from_arrays(np.zeros((10_000, 1)), np.zeros(10_000, int), classes=1).power_law(
        clients=10, exponent=1.0, minimum=1, test=0.0
    )
    expected = np.arange(1, 11) ** -1.0
    np.testing.assert_allclose(clients.sizes() / 10_000, expected / expected.sum(), atol=1e-3)


def test_by_owner_keeps_owners_apart():
    owners = np.array(["b", "a", "b", "c"])
    names, parts = partition.by_owner(owners)
    assert names == ["a", "b", "c"]
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]


def test_too_many_clients_are_refused():
    with pytest.raises(DataError, match="too few"):
        partition.iid(5, 6, rng())


def test_noise_has_the_variance_asked_for():
    x = np.zeros((4000, 30), np.float32)
    parts = partition.iid(4000, 4, rng())
    noisy = add_noise(x, parts, 0.8, rng())
    for client, rows in enumerate(parts):
        assert noisy[rows].var() == pytest.approx(0.8 * (client + 1) / 4, rel=0.05)
    assert not x.any()


def test_quarter_turns_are_numpys_and_other_angles_are_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    images = rng().random((10, 1, 9, 9)).astype(np.float32)
    parts = [np.array([client]) for client in range(10)]
    quarter = rotate(images, parts, 4)
    for client in range(10):
        np.testing.assert_array_equal(quarter[client, 0], np.rot90(images[client, 0], client % 4))
    tenth = rotate(images, parts, 10)
    for client in (1, 2, 3, 4):
        expected = ndimage.rotate(
            images[client, 0], 36 * client, reshape=False, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(tenth[client, 0], expected, atol=1e-5)


def test_flat_square_images_rotate_too():
    flat = rng().random((4, 16)).astype(np.float32)
    turned = rotate(flat, [np.array([0]), np.array([1, 2, 3])], 2)
    np.testing.assert_array_equal(turned[1].reshape(4, 4), np.rot90(flat[1].reshape(4, 4), 2))
    with pytest.raises(DataError, match="square"):
        rotate(np.zeros((4, 15), np.float32), [np.arange(4)], 2)


def test_minimum_zero_partitions():
    parts = partition.dirichlet(np.zeros(9, np.int64), 3, 0.1, 0, rng())
    assert sum(map(len, parts)) == 9


def shifted(images, **given):
    """Four clients of `feature_shift`; the targets number the rows, so each says whose it was."""
    numbers = np.arange(len(images), dtype=np.float32)
    dataset = data.from_arrays(images.copy(), numbers, task="regression")
    clients = dataset.feature_shift(clients=4, **given)
    np.testing.assert_array_equal(dataset.x, images)
    held = []
    for client in range(4):
        parts = [clients.train(client).all(), clients.test(client).all()]
        seen, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        held.append((seen, rows.astype(int)))
    assert_complete([rows for _, rows in held], len(images))
    return clients, held


def test_feature_shift_deals_evenly_and_adds_each_clients_variance():
    """Li et al., ICDE 2022, section 4.2: client i of N sees noise of variance level (i + 1) / N."""
    images = rng().normal(size=(4000, 5, 5)).astype(np.float32)
    clients, held = shifted(images, noise=0.8, seed=1)
    assert clients.sizes().tolist() == [800] * 4
    for client, (seen, rows) in enumerate(held):
        noise = seen - images[rows]
        # 25,000 draws: the variance of their variance is 2 / 25,000 of its square.
        assert noise.var() == pytest.approx(0.8 * (client + 1) / 4, rel=5 * np.sqrt(2 / 25_000))
        assert abs(noise.mean()) < 5 * np.sqrt(0.8 / 25_000)
    assert shifted(images, noise=0.8, seed=1)[0].digest() == clients.digest()
    assert shifted(images, noise=0.8, seed=2)[0].digest() != clients.digest()


def test_feature_shift_turns_each_clients_images_and_then_adds_noise():
    """Ghosh et al., NeurIPS 2020, section 6.1: quarter turns, which NumPy has too."""
    images = rng().normal(size=(400, 5, 5)).astype(np.float32)
    for client, (seen, rows) in enumerate(shifted(images, rotations=4)[1]):
        np.testing.assert_array_equal(seen, np.rot90(images[rows], client, axes=(1, 2)))
    for client, (seen, rows) in enumerate(shifted(images, rotations=2, noise=1e-6)[1]):
        turned = np.rot90(images[rows], 2 * (client % 2), axes=(1, 2))
        np.testing.assert_allclose(seen, turned, atol=6e-3)
        assert (seen != turned).mean() > 0.9


def test_feature_shift_of_nothing_is_iid_and_nonsense_is_refused():
    images = rng().normal(size=(40, 3, 3)).astype(np.float32)
    for seen, rows in shifted(images)[1]:
        np.testing.assert_array_equal(seen, images[rows])
    for nonsense in (
        {"noise": -0.1}, {"noise": math.nan}, {"noise": math.inf}, {"noise": "much"},
        {"rotations": 0}, {"rotations": 1.5}, {"rotations": True},
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"{next(iter(nonsense))} must be"):
            shifted(images, **nonsense)
