import json

import numpy as np
import pytest
import safetensors.numpy as library
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.core import safetensors
from atoll.core.updates import Update
from atoll.errors import RunError
from atoll.rounds.messages import message_size, pack, unpack

names = st.text(max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
arrays = st.dictionaries(
    names,
    st.one_of(
        hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
        for dtype in (np.float32, np.float64, np.int64)
    ),
    max_size=4,
)
texts = st.dictionaries(names, st.text(max_size=8), max_size=3)


@given(arrays, texts)
def test_round_trip_and_size(vectors, metadata):
    data = b"".join(safetensors.encode(vectors, metadata))
    assert len(data) == safetensors.size(vectors, metadata)
    decoded, read = safetensors.decode(data)
    assert read == metadata
    assert decoded.keys() == vectors.keys()
    for name, vector in vectors.items():
        assert decoded[name].dtype == vector.dtype
        np.testing.assert_array_equal(decoded[name], vector)


@given(st.floats(), st.floats())
def test_numbers_of_a_message_come_back_exactly_and_its_size_does_not_tell_them(weight, metric):
    update = Update({"delta": np.zeros(3, np.float32)}, weight, {}, {"train_loss": metric})
    data = b"".join(pack(update))
    read = unpack(data)
    np.testing.assert_array_equal([read.weight, read.metrics["train_loss"]], [weight, metric])
    plain = Update(update.vectors, 1.0, {}, {"train_loss": 0.0})
    assert len(data) == message_size(update) == message_size(plain)


@pytest.mark.parametrize("value", [None, "much", np.zeros(2), 10**400])
def test_metrics_that_are_no_numbers_are_said_where_they_are_made(value):
    with pytest.raises(RunError, match="an update's 'gain' is .*, not a number"):
        pack(Update({}, 1.0, {}, {"gain": value}))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\ud800", "\0", "n" * 257])
def test_names_that_are_not_fit_for_sentences_are_refused(name):
    with pytest.raises(safetensors.WireError, match="not printable"):
        safetensors.decode(b"".join(safetensors.encode({name: np.zeros(1)})))
    with pytest.raises(safetensors.WireError, match="not printable"):
        safetensors.decode(b"".join(safetensors.encode({}, {name: "text"})))


def test_the_safetensors_library_reads_ours_and_we_read_its():
    vectors = {"delta": np.arange(5, dtype=np.float32), "counters": np.array([1, 2**60])}
    ours = library.load(b"".join(safetensors.encode(vectors, {"a": "b"})))
    theirs, _ = safetensors.decode(library.save(vectors))
    for name, vector in vectors.items():
        np.testing.assert_array_equal(ours[name], vector)
        np.testing.assert_array_equal(theirs[name], vector)


@given(arrays, st.data())
def test_damaged_bytes_are_refused_or_read_as_something_valid(vectors, data):
    good = bytearray(b"".join(safetensors.encode(vectors)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded, _ = safetensors.decode(bytes(good))
    except safetensors.WireError:
        return
    assert sum(v.nbytes for v in decoded.values()) <= len(good)


@given(arrays.filter(lambda v: sum(a.nbytes for a in v.values()) > 0), st.data())
def test_every_truncation_is_refused(vectors, data):
    good = b"".join(safetensors.encode(vectors))
    with pytest.raises(safetensors.WireError):
        safetensors.decode(good[: data.draw(st.integers(0, len(good) - 1))])


def crafted(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"{",
        [],
        {"x": 1},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1}},
        {"__metadata__": {"a": 1}},
        {"x": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": 1}',
        json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode("utf-16"),
    ],
)
def test_crafted_headers_are_refused(header):
    with pytest.raises(safetensors.WireError):
        safetensors.decode(crafted(header))


def test_a_huge_declared_header_is_refused_before_it_is_read():
    with pytest.raises(safetensors.WireError, match="1 MiB"):
        safetensors.decode((1 << 62).to_bytes(8, "little") + b"{}")
