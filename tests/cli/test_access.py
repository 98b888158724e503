"""How the commands read a federation that goes on while they do."""

from __future__ import annotations

from itertools import islice

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("msgspec")

from atoll.cli.access import Access


class Growing(Access):
    """A federation that closes a round whenever it is asked."""

    def __init__(self):
        self.asked = 0

    def page_of_rounds(self, since):
        self.asked += 1
        last = 2 + self.asked
        states = [(n, "closed" if n < last else "open") for n in range(1, last + 1)]
        return [{"round": n, "state": state} for n, state in states if n > since][:2]

    def status(self): ...
    def sites(self): ...
    def revoke(self, name): ...
    def stop(self): ...
    def link(self): ...
    def close(self): ...


def test_no_round_is_told_as_open_before_one_that_is_told_too():
    told = list(islice(Growing().rounds(), 100))
    assert [row["round"] for row in told] == [*range(1, len(told) + 1)]
    assert [row["state"] for row in told[:-1]] == ["closed"] * (len(told) - 1)
    assert told[-1]["state"] == "open"
