"""Room: where large arrays lie changes nothing about them, and what rests leaves memory."""

import gc
import mmap
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from atoll.core import room
from atoll.core.room import difference, lies_in_file, opened, pieces, rest, room_in, zeros

SIZE = room.LARGE // 4 + 1234
linux = pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="nothing can be let go here")


def resident() -> int:
    """Bytes of this process's memory that are files', as the kernel counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssFile"].split()[0]) * 1024


def in_a_file(folder, array, **more):
    path = folder / "array"
    path.write_bytes(array.tobytes())
    return np.frombuffer(opened(path, **more), array.dtype)


def test_without_a_room_and_where_small_arrays_are_plain(tmp_path):
    assert not lies_in_file(zeros(SIZE, np.float32))
    with room_in(tmp_path):
        assert not lies_in_file(zeros(1000, np.float32))


@linux
def test_in_a_room_large_arrays_lie_in_files_that_nobody_sees(tmp_path):
    with room_in(tmp_path):
        array = zeros(SIZE, np.int64)
    assert lies_in_file(array) and array.shape == (SIZE,) and not array.any()
    assert list(tmp_path.iterdir()) == []
    array += 7
    rest(array)
    assert (array == 7).all()


@linux
def test_what_rests_is_not_in_memory_and_is_as_it_was(tmp_path):
    with room_in(tmp_path):
        array = zeros(SIZE, np.float32)
    before = resident()
    array[:] = np.arange(SIZE)
    assert resident() - before > array.nbytes // 2
    rest(array, 10, SIZE - 10)
    assert resident() - before < array.nbytes // 8
    np.testing.assert_array_equal(array, np.arange(SIZE, dtype=np.float32))


@linux
def test_a_full_disk_is_made_up_for_by_memory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.posix_fallocate", full)
    with room_in(tmp_path):
        array = zeros(SIZE, np.float32)
    assert not lies_in_file(array) and array.shape == (SIZE,)


def test_without_a_system_that_can_let_go_everything_is_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_able", False)
    with room_in(tmp_path):
        array = zeros(SIZE, np.float32)
    assert not lies_in_file(array)
    rest(array)
    assert not lies_in_file(in_a_file(tmp_path, np.ones(SIZE, np.float32)))


@linux
def test_a_room_ends_with_its_block_also_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="on purpose"), room_in(tmp_path):
        raise ValueError("on purpose")
    assert not lies_in_file(zeros(SIZE, np.float32))


@pytest.mark.parametrize("size", [5, SIZE])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_difference_is_the_same_bytes_wherever_things_lie(tmp_path, size, mapped):
    rng = np.random.default_rng(0)
    after, before = (rng.standard_normal(size, dtype=np.float32) for _ in range(2))
    expected = after - before
    given = in_a_file(tmp_path, before, writable=True) if mapped else before
    assert difference(after, given).tobytes() == expected.tobytes()
    assert given.tobytes() == before.tobytes()


def test_a_difference_of_rows_and_of_other_kinds_is_the_operator():
    rows = np.ones((2, SIZE), np.float32)
    assert difference(rows, np.ones(SIZE, np.float32)).shape == (2, SIZE)
    assert difference(3, 1) == 2


def test_pieces_cover_a_size_once():
    parts = list(pieces(SIZE, 4))
    assert parts[0][0] == 0 and parts[-1][1] == SIZE
    assert all(one[1] == other[0] for one, other in pairwise(parts))
    assert list(pieces(0, 4)) == []


@linux
def test_a_file_of_a_room_ends_with_its_array(tmp_path):
    with room_in(tmp_path):
        array = zeros(SIZE, np.float32)
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text()
    del array
    gc.collect()
    assert str(tmp_path) not in maps.read_text()


@linux
def test_a_piece_of_a_file_is_read_without_looking_at_the_rest(tmp_path):
    plain = np.arange(SIZE, dtype=np.float32)
    array, into = in_a_file(tmp_path, plain), np.empty(100, np.float32)
    before = resident()
    found = room.read(array, SIZE - 90, SIZE, into)
    np.testing.assert_array_equal(found, plain[-90:])
    assert np.shares_memory(found, into) and resident() - before < 1 << 20
    np.testing.assert_array_equal(room.read(array[7:], 3, 9, into), plain[10:16])
    assert np.shares_memory(room.read(plain, 3, 9, into), plain)


@linux
def test_the_file_is_closed_with_the_last_view_of_it(tmp_path):
    array = in_a_file(tmp_path, np.ones(SIZE, np.float32))
    file = array.base.obj.file if isinstance(array.base, memoryview) else array.base.file
    os.fstat(file)
    del array
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file)
