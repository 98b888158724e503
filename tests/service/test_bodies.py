"""Bodies that go out while those who asked for them come and go."""

from __future__ import annotations

import asyncio
import threading

import pytest

pytest.importorskip("starlette")
pytest.importorskip("msgspec")

import anyio

from atoll.service.http.bodies import read_in_threads


def test_a_reader_that_goes_away_in_the_middle_of_a_piece_leaves_nothing_open():
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def source():
        try:
            yield b"first"
            begun.set()
            go_on.wait(10)
            yield b"second"
        finally:
            closed.set()

    async def story():
        found = []

        async def read():
            async for piece in read_in_threads(source()):
                found.append(piece)

        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            while not begun.is_set():
                await asyncio.sleep(0.01)
            # As Starlette does when a client hangs up.
            group.cancel_scope.cancel()
        assert found == [b"first"]
        assert not closed.is_set()
        go_on.set()
        for _ in range(500):
            if closed.is_set():
                break
            await asyncio.sleep(0.01)
        assert closed.is_set()
        assert complaints == []

    asyncio.run(story())


def test_all_pieces_come_and_a_fault_is_told():
    closed = []

    def source(fault):
        try:
            yield from (b"a", b"b")
            if fault:
                raise OSError("gone")
        finally:
            closed.append(fault)

    async def read(fault):
        return [piece async for piece in read_in_threads(source(fault))]

    assert asyncio.run(read(False)) == [b"a", b"b"]
    with pytest.raises(OSError, match="gone"):
        asyncio.run(read(True))
    assert closed == [False, True]
