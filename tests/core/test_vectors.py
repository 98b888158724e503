import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.core.vectors import Layout
from atoll.errors import LayoutError

floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
    elements=st.floats(-1e6, 1e6, width=32),
)
integers = hnp.arrays(np.int64, hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
names = st.text("abcxyz._", min_size=1, max_size=6)


@given(
    st.dictionaries(names.map("p.".__add__), floats, max_size=4),
    st.dictionaries(names.map("b.".__add__), st.one_of(floats, integers), max_size=4),
)
def test_pack_and_unpack_are_inverse(parameters, buffers):
    layout = Layout.of(parameters, buffers)
    arrays = {**parameters, **buffers}
    unpacked = layout.unpack(layout.pack(arrays))
    assert unpacked.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(unpacked[name], array)


def test_counters_keep_integers_that_float32_cannot():
    layout = Layout.of({"w": np.zeros(2, np.float32)}, {"n": np.array(2**53 + 1)})
    packed = layout.pack({"w": np.zeros(2), "n": np.array(2**53 + 1)})
    assert packed["counters"].dtype == np.int64
    assert layout.unpack(packed)["n"] == 2**53 + 1


def test_unpack_gives_views_and_keeps_a_leading_cohort_axis():
    layout = Layout.of({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})
    vectors = {"params": np.arange(9, dtype=np.float32)}
    layout.unpack(vectors)["w"][1, 2] = 50
    assert vectors["params"][5] == 50
    stacked = layout.unpack({"params": np.arange(18, dtype=np.float32).reshape(2, 9)})
    assert stacked["w"].shape == (2, 2, 3)
    assert stacked["b"][1].tolist() == [15, 16, 17]


def test_select_by_pattern():
    layout = Layout.of(
        {"body.w": np.zeros(2, np.float32), "head.w": np.zeros(3, np.float32)},
        {"body.mean": np.zeros(2, np.float32)},
    )
    assert layout.select("head.*").tolist() == [2, 3, 4]
    assert layout.select("*.mean", section="buffers").tolist() == [0, 1]
    with pytest.raises(LayoutError, match="matches tail"):
        layout.select("tail.*")


def test_digest_tells_layouts_apart():
    def digest(shape=(2, 3), dtype=np.float32, name="w"):
        return Layout.of({name: np.zeros(shape, dtype)}).digest

    assert digest() == digest()
    assert len({digest(), digest((3, 2)), digest(dtype=np.float64), digest(name="v")}) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "'w' is missing"),
        ({"w": np.zeros(3), "n": np.array(1)}, "has shape"),
        ({"w": np.zeros(2), "n": np.array(1), "u": np.zeros(1)}, "does not know: u"),
        ({"w": np.zeros(2), "n": np.array(1.5)}, "must be integer"),
    ],
)
def test_pack_refuses_what_does_not_fit(arrays, message):
    layout = Layout.of({"w": np.zeros(2, np.float32)}, {"n": np.array(1)})
    with pytest.raises(LayoutError, match=message):
        layout.pack(arrays)


def test_integer_parameters_are_refused():
    with pytest.raises(LayoutError, match="must be floating point"):
        Layout.of({"w": np.zeros(2, np.int64)})
