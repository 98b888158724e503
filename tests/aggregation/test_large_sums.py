"""Sums of vectors that lie in mapped files: the same bytes as of those in memory, without a sum."""

import numpy as np
import pytest

from atoll.aggregation import sums
from atoll.aggregation.sums import FixedSum
from atoll.core import room

pytestmark = pytest.mark.skipif(not room._able, reason="nothing can be let go here")
SIZE = room.LARGE // 4 + 777
WEIGHTS = [3.0, 10.0, 1.5, 7.25, 100.0]
PLACES = range(len(WEIGHTS))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Vectors in memory, and the same ones in mapped files."""
    folder, rng, pairs = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0), []
    for number in range(len(WEIGHTS)):
        vector = rng.standard_normal(SIZE, dtype=np.float32)
        path = folder / str(number)
        path.write_bytes(vector.tobytes())
        pairs.append((vector, np.frombuffer(room.opened(path), np.float32)))
    return pairs


def total(given, which, places=PLACES):
    summed = FixedSum(SIZE)
    for place in places:
        summed.add(given[place][which], WEIGHTS[place])
    return summed


@pytest.mark.parametrize("at_once", [16, 2])
def test_what_lies_in_files_is_summed_to_the_same_bytes(given, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(sums, "AT_ONCE", at_once)
    weight = sum(WEIGHTS)
    with room.room_in(tmp_path):
        assert total(given, 1).value().tobytes() == total(given, 0).value().tobytes()
        quotient = total(given, 1).quotient(weight)
        assert quotient.tobytes() == total(given, 0).quotient(weight).tobytes()
        one, other = total(given, 1, [0, 3]), total(given, 1, [1, 2, 4])
        one.merge(other)
        assert one.quotient(weight).tobytes() == quotient.tobytes()
        kept = FixedSum(SIZE)
        kept.restore(total(given, 1).state())
        assert kept.quotient(weight).tobytes() == quotient.tobytes()
    # The same in float64, rounded once: an independent reckoning.
    exact = sum(w * v.astype(np.float64) for w, (v, _) in zip(WEIGHTS, given, strict=True)) / weight
    np.testing.assert_allclose(quotient, exact, rtol=1e-6, atol=1e-9)


def test_a_few_in_files_need_no_sum_of_their_size(given):
    summed = total(given, 1)
    assert summed._words is None
    summed.quotient(sum(WEIGHTS))
    assert summed._words is None


def test_in_memory_and_in_files_mix_and_so_do_magnitudes(given, tmp_path):
    huge = np.full(SIZE, 2.0**20, np.float32)
    with room.room_in(tmp_path):
        mixed, plain = total(given, 1), total(given, 0)
        for each in (mixed, plain):
            each.add(huge, 3.0)
            each.add(given[0][0], 2.0)
        assert mixed.high is not None
        assert mixed.value().tobytes() == plain.value().tobytes()
        assert mixed.quotient(5.0).tobytes() == plain.quotient(5.0).tobytes()


def test_beyond_fixed_point_a_mapped_vector_is_summed_in_floats_and_said(tmp_path):
    path = tmp_path / "vector"
    path.write_bytes(np.full(SIZE, 1e30, np.float32).tobytes())
    summed = FixedSum(SIZE)
    summed.add(np.frombuffer(room.opened(path), np.float32), 1.0)
    assert not summed.exact
    assert summed.quotient(2.0)[-1] == np.float32(5e29)
