import numpy as np
import pytest

from atoll.core.random import Key
from atoll.errors import ConfigurationError
from atoll.rounds.roster import Resources, Roster
from atoll.rounds.schedules import ByResources, BySize, Poisson, RoundRobin, Uniform

N = 20


def roster(present=None, resources=None, count=N):
    return Roster([str(i) for i in range(count)], np.arange(1, count + 1), present, resources)


def draws(selection, count, rounds=4000, **given):
    return [selection.draw(roster(**given), count, r, Key(0).fold(r)) for r in range(1, rounds)]


@pytest.mark.parametrize("present", [None, np.arange(0, N, 2)])
def test_uniform_draws_distinct_members_equally_often(present):
    sets = draws(Uniform(), 5, present=present)
    assert all(len(set(drawn.tolist())) == 5 for drawn in sets)
    counts = np.bincount(np.concatenate(sets), minlength=N)
    candidates = np.arange(N) if present is None else present
    expected = 5 * len(sets) / len(candidates)
    # Five standard deviations of a binomial count.
    assert np.abs(counts[candidates] - expected).max() < 5 * np.sqrt(expected)
    assert counts.sum() == counts[candidates].sum()


def test_poisson_includes_each_independently_with_its_rate():
    sets = draws(Poisson(), 5)
    sizes = np.array([len(drawn) for drawn in sets])
    rate = 5 / N
    assert sizes.mean() == pytest.approx(5, rel=0.03)
    assert sizes.var() == pytest.approx(N * rate * (1 - rate), rel=0.1)
    together = np.mean([{0, 1} <= set(drawn.tolist()) for drawn in sets])
    assert together == pytest.approx(rate**2, abs=0.015)


def test_by_size_prefers_those_who_hold_more():
    singles = np.bincount(np.concatenate(draws(BySize(), 1, rounds=20_000)), minlength=N)
    expected = np.arange(1, N + 1) / np.arange(1, N + 1).sum()
    np.testing.assert_allclose(singles / singles.sum(), expected, atol=0.01)


def test_draws_depend_on_their_key_alone():
    for selection in (Uniform(), Poisson(), BySize(), RoundRobin()):
        one = selection.draw(roster(), 6, 3, Key(4))
        np.testing.assert_array_equal(one, selection.draw(roster(), 6, 3, Key(4)))
        assert (np.diff(one) > 0).all()


def test_by_resources_asks_for_all_conditions():
    resources = Resources(
        charging=np.arange(N) % 2 == 0,
        unmetered=np.arange(N) < 10,
        speed=np.arange(N, dtype=float),
    )
    fit = ByResources(minimum_speed=3.0).draw(roster(resources=resources), N, 1, Key(0))
    assert fit.tolist() == [4, 6, 8]
    with pytest.raises(ConfigurationError, match="devices that report"):
        ByResources().draw(roster(), 3, 1, Key(0))


def test_a_draw_from_a_million_is_quick_and_small():
    import tracemalloc

    big = Roster(range(1_000_000), np.zeros(0, np.int64))
    tracemalloc.start()
    drawn = Uniform().draw(big, 1000, 1, Key(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(drawn.tolist())) == 1000
    assert peak < 1_000_000
