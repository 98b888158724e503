"""Exact sums: any order and grouping gives the same bits, and they are right."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.aggregation.sums import FixedSum

SIZE = 3
wide = hnp.arrays(
    np.float32, SIZE, elements=st.floats(-(2.0**28), 2.0**28, width=32, allow_subnormal=False)
)
weighted = st.lists(st.tuples(wide, st.integers(1, 1000)), min_size=1, max_size=12)


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


@given(weighted)
def test_sums_of_rows_are_the_same_bits_as_one_by_one(items):
    rows = FixedSum(SIZE)
    rows.add_rows(np.stack([vector for vector, _ in items]), [weight for _, weight in items])
    assert rows.value().tobytes() == total(items).value().tobytes()


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
