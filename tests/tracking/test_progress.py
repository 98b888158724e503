"""Progress on a terminal and in a log."""

import io

import pytest

from atoll.tracking.progress import LiveProgress, PlainProgress


def test_plain_progress(blobs, federation):
    stream = io.StringIO()
    federation.simulate(blobs, observers=[PlainProgress(stream)])
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("round 1/6  loss ")
    assert "accuracy" in lines[0]
    assert "left" in lines[0]
    assert "round 6/6" in lines[-1]
    assert "done in" in lines[-1]


def test_live_progress(blobs, federation):
    pytest.importorskip("rich")
    stream = io.StringIO()
    federation.simulate(blobs, observers=[LiveProgress(stream)])
    assert "6/6" in stream.getvalue()
