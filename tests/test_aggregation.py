from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.aggregation import Clip, Mean, Schema, Stage
from atoll.aggregation.pipeline import Pipeline
from atoll.aggregation.sums import FixedSum
from atoll.aggregation.validate import admit
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.errors import ConfigurationError, RunError, UpdateRefused

SIZE = 3
vectors = hnp.arrays(np.float32, SIZE, elements=st.floats(-1e4, 1e4, width=32))
wide = hnp.arrays(
    np.float32, SIZE, elements=st.floats(-(2.0**28), 2.0**28, width=32, allow_subnormal=False)
)
weighted = st.lists(st.tuples(wide, st.integers(1, 1000)), min_size=1, max_size=12)
SCHEMA = Schema({"delta": SIZE}, {})


def total(items, order=None):
    summed = FixedSum(SIZE)
    for index in order if order is not None else range(len(items)):
        summed.add(*items[index])
    return summed


@given(weighted, st.randoms())
def test_sums_are_the_same_bits_in_any_order(items, random):
    order = list(range(len(items)))
    random.shuffle(order)
    assert total(items).value().tobytes() == total(items, order).value().tobytes()


@given(weighted, st.integers(0, 12))
def test_sums_are_the_same_bits_in_any_grouping(items, cut):
    one, other = total(items[:cut]), total(items[cut:])
    one.merge(other)
    assert one.value().tobytes() == total(items).value().tobytes()


@given(weighted, wide, st.integers(1, 1000))
def test_withdrawing_leaves_no_trace(items, vector, weight):
    summed = FixedSum(SIZE)
    summed.add(vector, weight)
    for item in items:
        summed.add(*item)
    summed.add(vector, weight, -1)
    assert summed.value().tobytes() == total(items).value().tobytes()


@given(weighted)
def test_sums_are_right_to_half_a_unit_per_value(items):
    value = total(items).value()
    for position in range(SIZE):
        exact = sum(Fraction(float(v[position])) * w for v, w in items)
        # Each product is rounded to float64 and to a unit of 2^-40; the sum to float64 once.
        slack = sum(abs(float(v[position])) * w for v, w in items) * 2**-52
        assert abs(Fraction(float(value[position])) - exact) <= len(items) * 2**-41 + slack


def test_sums_carry_before_they_overflow():
    summed = FixedSum(1)
    big = np.array([2.0**19], np.float32)
    for _ in range(40):
        summed.add(big, 1.0)
    assert summed.value()[0] == 40 * 2.0**19
    assert summed.high is not None
    assert summed.exact


def test_what_is_beyond_fixed_point_is_summed_in_floats_and_said():
    summed = FixedSum(1)
    summed.add(np.array([1e30], np.float32), 1.0)
    summed.add(np.array([1.0], np.float32), 1.0)
    assert not summed.exact
    assert summed.value()[0] == pytest.approx(1e30)


def mean_of(updates, population=10):
    accumulator = Mean().open(SCHEMA)
    for update in updates:
        accumulator.add(update)
    return accumulator.close(population)


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
    schema = Schema({"delta": 1}, {"counters": 2, "buffers": 1})

    def update(counters, weight):
        statistics = {
            "counters": np.array(counters, np.int64),
            "buffers": np.array([counters[0]], np.float32),
        }
        return Update({"delta": np.zeros(1, np.float32)}, weight, statistics)

    accumulator = Mean().open(schema)
    accumulator.add(update([2, 2**60 + 1], 1.0))
    accumulator.add(update([3, 2**60 + 1], 1.0))
    statistics = accumulator.close(2).statistics
    assert statistics["counters"].tolist() == [2, 2**60 + 1]
    assert statistics["counters"].dtype == np.int64
    assert statistics["buffers"].tolist() == [2.5]


def test_mean_of_nothing_is_an_error():
    with pytest.raises(RunError, match="nothing to average"):
        Mean().open(SCHEMA).close(1)


def test_the_float_fallback_is_said_aloud(caplog):
    aggregate = mean_of([Update({"delta": np.full(SIZE, 1e30, np.float32)})])
    assert aggregate.measurements["float_fallback"] == 1
    assert "probably diverging" in caplog.text
    np.testing.assert_allclose(aggregate["delta"], 1e30, rtol=1e-6)


@given(vectors, vectors, st.floats(0.01, 100))
def test_clip_bounds_the_norm_over_all_vectors_and_keeps_the_direction(one, other, norm):
    update = Update({"delta": one, "control": other}, statistics={"buffers": one * 100})
    clipped, _ = Clip(norm).encode(update, {}, {}, Key(0))
    flat = np.concatenate([clipped.vectors["delta"], clipped.vectors["control"]]).astype(float)
    whole = np.concatenate([one, other]).astype(float)
    assert np.linalg.norm(flat) <= norm * (1 + 1e-5)
    scale = min(1.0, norm / max(np.linalg.norm(whole), 1e-30))
    np.testing.assert_allclose(flat, scale * whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped.statistics["buffers"], one * 100)
    assert clipped.metrics["clipped"] == (np.linalg.norm(whole) > norm)


def test_clip_sees_rows_of_a_cohort_one_by_one():
    update = Update({"delta": np.full((2, 4), 3.0, np.float32)})
    with pytest.raises(ConfigurationError, match="must be positive"):
        Clip(0.0)
    rows = [
        Clip(1.0).encode(Update({"delta": row}), {}, {}, Key(0))[0].vectors["delta"]
        for row in update.vectors["delta"]
    ]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


class Doubling(Stage):
    """Doubles on the client, halves on the server, counts at both."""

    def init(self):
        return {"rounds": np.zeros(1, np.int64)}

    def broadcast(self, state):
        return {"factor": np.array([2.0], np.float32)}

    def remember(self, schema):
        return {"turns": np.zeros(1, np.int64)}

    def encode(self, update, told, memory, key):
        doubled = {name: told["factor"] * v for name, v in update.vectors.items()}
        return Update(doubled, update.weight), {"turns": memory["turns"] + 1}

    def decode(self, update, schema):
        return Update({name: v / 2 for name, v in update.vectors.items()}, update.weight)

    def release(self, aggregate, state, key):
        return aggregate, {"rounds": state["rounds"] + 1}


def test_stages_run_forward_on_the_client_and_back_on_the_server():
    pipeline = Clip(1.0) >> Doubling() >> Doubling() >> Mean()
    state, memory = pipeline.init(), pipeline.remember(SCHEMA)
    told = pipeline.broadcast(state)
    update = Update({"delta": np.array([3.0, 0, 4.0], np.float32)})
    message, memory = pipeline.encode(update, told, memory, Key(0))
    np.testing.assert_allclose(message.vectors["delta"], [2.4, 0, 3.2], rtol=1e-6)
    assert {name: int(v[0]) for name, v in memory.items()} == {"1/turns": 1, "2/turns": 1}
    decoded = pipeline.decode(message, SCHEMA)
    np.testing.assert_allclose(decoded.vectors["delta"], [0.6, 0, 0.8], rtol=1e-6)
    accumulator = pipeline.open(SCHEMA)
    accumulator.add(decoded)
    _, state = pipeline.release(accumulator.close(1), state, Key(0))
    assert {name: int(v[0]) for name, v in state.items()} == {"1/rounds": 1, "2/rounds": 1}


def test_pipelines_need_exactly_one_reducer():
    with pytest.raises(ConfigurationError, match="exactly one stage"):
        Pipeline(Clip(1.0)).check(("delta",), weighted=True)
    with pytest.raises(ConfigurationError, match="has 2"):
        (Mean() >> Mean()).check(("delta",), weighted=True)


def good():
    return Update({"delta": np.zeros(SIZE, np.float32)}, 1.0)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (Update({"delta": np.array([0, np.nan, np.inf], np.float32)}), "2 values that are NaN"),
        (Update({"delta": np.zeros(SIZE + 1, np.float32)}), r"float32 \[3\] was asked for"),
        (Update({"delta": np.zeros(SIZE)}), "is float64"),
        (Update({}), "vectors are none, but delta were asked for"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, 0.0), "weight is 0.0"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, float("nan")), "weight is nan"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, 1e300), "weight is 1e"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, 1e-8), "so scale them"),
        (
            Update({"delta": np.zeros(SIZE, np.float32)}, statistics={"buffers": np.zeros(1)}),
            "statistics are buffers",
        ),
        (
            Update({"delta": np.zeros(SIZE, np.float32)}, metrics={str(i): 0.0 for i in range(99)}),
            "more than 64 metrics",
        ),
    ],
)
def test_the_door_refuses_with_a_reason(update, message):
    admit(good(), SCHEMA)
    with pytest.raises(UpdateRefused, match=message):
        admit(update, SCHEMA)
