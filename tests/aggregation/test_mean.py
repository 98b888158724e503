"""Mean: over those who sent, exact for whole numbers, and the same bits in any grouping."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.aggregation import Mean, Rows, Schema, Spec
from atoll.core.random import Key
from atoll.core.updates import Update

SIZE = 3
SCHEMA = Schema.of({"delta": SIZE})
vectors = hnp.arrays(np.float32, SIZE, elements=st.floats(-1e4, 1e4, width=32))


def summed(updates, schema=SCHEMA):
    accumulator = Mean().open(schema)
    for number, update in enumerate(updates):
        accumulator.add(update, (f"c{number}", 1))
    return accumulator


def mean_of(updates, population=10, schema=SCHEMA):
    return summed(updates, schema).close(population, {}, Key(0))


@given(st.lists(st.tuples(vectors, st.integers(1, 100)), min_size=1, max_size=8))
def test_mean_is_the_weighted_mean(items):
    updates = [Update({"delta": v}, weight=w) for v, w in items]
    expected = np.average(
        [v.astype(float) for v, _ in items], axis=0, weights=[w for _, w in items]
    )
    aggregate = mean_of(updates)
    np.testing.assert_allclose(aggregate["delta"], expected, rtol=1e-6, atol=1e-8)
    assert aggregate["delta"].dtype == np.float32
    assert aggregate.weight == sum(w for _, w in items)
    assert aggregate.participation == len(items) / 10


def test_mean_of_counters_is_rounded_half_to_even_in_integers():
    schema = Schema({"delta": Spec((1,))}, {"counters": Spec((2,), "int64"), "buffers": Spec((1,))})

    def update(counters, weight):
        statistics = {
            "counters": np.array(counters, np.int64),
            "buffers": np.array([counters[0]], np.float32),
        }
        return Update({"delta": np.zeros(1, np.float32)}, weight, statistics)

    updates = [update([2, 2**60 + 1], 1.0), update([3, 2**60 + 1], 1.0)]
    statistics = mean_of(updates, 2, schema).statistics
    assert statistics["counters"].tolist() == [2, 2**60 + 1]
    assert statistics["counters"].dtype == np.int64
    assert statistics["buffers"].tolist() == [2.5]


def test_mean_of_nothing_is_zeros_of_no_weight():
    nothing = mean_of([], 1)
    assert nothing.weight == nothing.count == 0
    np.testing.assert_array_equal(nothing["delta"], np.zeros(SIZE, np.float32))


def test_the_float_fallback_is_said_aloud(caplog):
    aggregate = mean_of([Update({"delta": np.full(SIZE, 1e30, np.float32)})])
    assert aggregate.measurements["float_fallback"] == 1
    assert "probably diverging" in caplog.text
    np.testing.assert_allclose(aggregate["delta"], 1e30, rtol=1e-6)


def test_sums_of_whole_numbers_are_exact():
    """2^24 + 1 is no float32; three of them are 50,331,651."""
    schema = Schema.of({"count": Spec((2,), "int64")})
    updates = [Update({"count": np.array([16_777_217, -5])}) for _ in range(3)]
    aggregate = mean_of(updates, 3, schema)
    assert aggregate.sum("count").tolist() == [50_331_651, -15]
    assert aggregate["count"].tolist() == [16_777_217, -5]
    assert aggregate["count"].dtype == np.float64


@given(st.lists(st.integers(-(2**37), 2**37), min_size=1, max_size=100))
def test_sums_of_any_whole_numbers_are_exact(values):
    """Also for numbers of clients by which a float64 cannot be divided and multiplied back."""
    schema = Schema.of({"count": Spec((1,), "int64")})
    aggregate = mean_of([Update({"count": np.array([v])}) for v in values], 100, schema)
    assert aggregate.sum("count").tolist() == [sum(values)]


def test_one_in_49_is_one():
    schema = Schema.of({"count": Spec((1,), "int64")})
    updates = [Update({"count": np.array([int(number == 0)])}) for number in range(49)]
    assert mean_of(updates, 49, schema).sum("count").tolist() == [1]


def test_float64_vectors_are_not_narrowed():
    schema = Schema.of({"wide": Spec((2,), "float64")})
    values = [np.array([16_777_217.25, 1 + 2.0**-39]), np.array([16_777_217.75, 1 + 2.0**-38])]
    aggregate = mean_of([Update({"wide": value}, 3.0) for value in values], 2, schema)
    assert aggregate["wide"].dtype == np.float64
    assert aggregate["wide"].tolist() == [16_777_217.5, 1 + 1.5 * 2.0**-39]


def test_shapes_are_kept():
    schema = Schema.of({"matrix": (2, 3), "number": ()})
    given = {"matrix": np.arange(6, dtype=np.float32).reshape(2, 3), "number": np.float32([7])[0]}
    update = Update({name: np.asarray(value) for name, value in given.items()})
    aggregate = mean_of([update, update], 2, schema)
    assert aggregate["number"].shape == () and aggregate["number"] == 7
    assert aggregate["matrix"].tolist() == [[0, 1, 2], [3, 4, 5]]


PARTS = Schema.of({"delta": SIZE, "head": Spec((SIZE,), optional=True)})
quarters = st.sampled_from([0, Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), 1])
sent = st.lists(st.tuples(vectors, st.integers(1, 100), quarters), min_size=1, max_size=8)


def part_of(vector, weight, share):
    """An update of which `head` counts for a share; what counts for nothing is left out."""
    own = {"delta": vector, "head": vector} if share else {"delta": vector}
    return Update(own, weight, shares={} if share == 1 else {"head": float(share)})


@given(sent)
def test_the_mean_is_over_those_who_sent(items):
    aggregate = mean_of([part_of(*item) for item in items], schema=PARTS)
    whole = sum(weight for _, weight, _ in items)
    behind = sum(weight * share for _, weight, share in items)
    assert Fraction(aggregate.share("head")) == Fraction(float(Fraction(behind, whole)))
    assert aggregate.share("delta") == 1
    for position in range(SIZE):
        parts = [(Fraction(float(v[position])), w, s) for v, w, s in items]
        exact = sum(v * w * s for v, w, s in parts) / behind if behind else Fraction(0)
        # Each value to a unit of 2^-40; the mean to float64, then to float32.
        slack = len(items) * Fraction(1, 2**40) + abs(exact) * Fraction(1, 2**23)
        assert abs(Fraction(float(aggregate["head"][position])) - exact) <= slack
        plain = sum(v * w for v, w, _ in parts) / whole
        slack = len(items) * Fraction(1, 2**40) + abs(plain) * Fraction(1, 2**23)
        assert abs(Fraction(float(aggregate["delta"][position])) - plain) <= slack


@given(sent, st.integers(0, 8), st.randoms())
def test_shares_are_the_same_bits_in_any_order_and_grouping(items, cut, random):
    updates = [part_of(*item) for item in items]
    expected = mean_of(updates, schema=PARTS)
    random.shuffle(updates)
    one, other = summed(updates[:cut], PARTS), summed(updates[cut:], PARTS)
    travelled = one.fresh()
    travelled.restore({name: array.copy() for name, array in other.state().items()})
    one.merge(travelled)
    aggregate = one.close(10, {}, Key(0))
    for name in ("delta", "head"):
        assert aggregate[name].tobytes() == expected[name].tobytes()
        assert aggregate.share(name) == expected.share(name)


@given(st.lists(st.tuples(vectors, st.integers(1, 100)), min_size=1, max_size=8))
def test_rows_are_the_same_bits_as_updates(items):
    rows = Rows(
        {"delta": np.stack([v for v, _ in items])}, {}, [float(w) for _, w in items],
        {"loss": [float(w) for _, w in items]}, [(f"c{n}", 1) for n in range(len(items))],
    )  # fmt: skip
    together = Mean().open(SCHEMA)
    together.add_rows(rows)
    one, other = (
        together.close(10, {}, Key(0)),
        mean_of([Update({"delta": v}, w, metrics={"loss": float(w)}) for v, w in items]),
    )
    assert one["delta"].tobytes() == other["delta"].tobytes()
    assert (one.weight, one.measurements) == (other.weight, other.measurements)
