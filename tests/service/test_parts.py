"""The service's parts by themselves: sessions, pace, lease, migrations, audit, logs."""

from __future__ import annotations

import json
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.cli.logs import log_to
from atoll.errors import ConfigurationError
from atoll.protocol.identity import Session, Sessions
from atoll.service.http.app import App
from atoll.service.http.openapi import description
from atoll.service.http.pace import LONGEST, Pace
from atoll.service.storage.audit import GENESIS, verify
from atoll.service.storage.database import NotLeading, Store, engine_for
from atoll.service.storage.tables import audit, settings, sites


@given(st.lists(st.integers(1, 200), max_size=80))
def test_a_counter_is_taken_once(counters):
    """Against a plain set: once each, in any order within the last 64."""
    session = Session("id", "a", "site", "", b"", 0.0)
    used, highest = set(), 0
    for counter in counters:
        expected = counter not in used and counter > highest - 64
        assert session.take(counter) == expected
        if expected:
            used.add(counter)
            highest = max(highest, counter)


def test_challenges_are_for_one_site_one_time_and_one_minute():
    now = [100.0]
    sessions = Sessions(lambda: now[0])
    nonce = sessions.challenge("a")
    assert not sessions.answered("b", nonce)
    assert sessions.answered("a", nonce)
    assert not sessions.answered("a", nonce)
    late = sessions.challenge("a")
    now[0] += 61
    assert not sessions.answered("a", late)
    assert not sessions.answered("a", "00" * 32)


def test_a_site_has_few_sessions_and_they_end():
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    opened = [sessions.open("a", "site", "key") for _ in range(6)]
    assert [sessions.find(s.id) is not None for s in opened] == [False, False, *[True] * 4]
    now[0] += 3601
    assert sessions.find(opened[-1].id) is None
    assert "key" not in repr(opened[0]).split("public=")[0]
    assert opened[0].key.hex() not in repr(opened[0])


def test_the_more_come_the_later_they_are_asked_again():
    """10,000 within ten seconds at 500 a second: about twenty seconds are needed."""
    pace = Pace(rate=500.0)
    assert pace.window(waited=False)[1] < 1
    for n in range(10_000):
        pace.arrived(n / 1000)
    least, most = pace.window(waited=False)
    assert 5 < least < most < 40
    for n in range(10_000_000 // 1000):
        pace.arrived(10 + n / 1e6)
    assert pace.window(waited=False)[1] <= 1.5 * LONGEST


def test_one_process_leads_and_another_takes_over(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    first, second = Store(url, lease_seconds=0.3), Store(url, lease_seconds=0.3)
    assert first.lead()
    assert not second.lead()
    with first.change() as change:
        change.set("a", 1)
    # The first one is busy for longer than its lease; the second takes over.
    assert not second.lead()
    time.sleep(0.4)
    assert second.lead()
    with pytest.raises(NotLeading), first.change() as change:
        change.set("a", 2)
    assert second.setting("a") == 1
    assert not first.lead()
    second.resign()
    assert first.lead()
    for store in (first, second):
        store.close()


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_lease_is_told_by_the_clock_of_who_waits(tmp_path, monkeypatch, ahead):
    """A leader whose clock is an hour off is not robbed while it lives, nor waited for for long."""
    url, real = f"sqlite:///{tmp_path / 'x.db'}", time.time
    first, second = Store(url, lease_seconds=0.3), Store(url, lease_seconds=0.3)
    first.holder = "elsewhere:1:ab"

    def leads():
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: real() + ahead)
            return first.lead()

    for _ in range(8):
        assert leads()
        assert not second.lead()
        time.sleep(0.1)
    time.sleep(0.3)
    assert second.lead()
    for store in (first, second):
        store.close()


def test_a_failed_transaction_leaves_nothing(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    store.lead()
    with pytest.raises(ZeroDivisionError), store.change() as change:  # noqa: PT012
        change.set("a", 1)
        change.audit("me", "did")
        raise ZeroDivisionError
    assert store.setting("a") is None
    with store.reading() as connection:
        assert verify(connection) == (0, GENESIS, "")
    store.close()


def test_every_tampering_with_the_audit_log_shows(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    with store.change(leading=False) as change:
        for n in range(5):
            change.audit("me", "did", n=n)
    for tamper, problem in (
        (audit.update().where(audit.c.number == 3).values(detail='{"n":7}'), "line 3 was changed"),
        (audit.update().where(audit.c.number == 3).values(actor="you"), "line 3 was changed"),
        (audit.delete().where(audit.c.number == 2), "line 2 is missing"),
    ):
        with store.change(leading=False) as change:
            change.run(tamper)
            count, _, found = verify(change.connection)
            change.connection.rollback()
        assert found.startswith(problem)
        assert count == int(problem.split()[1]) - 1
    with store.reading() as connection:
        assert verify(connection)[0] == 5
    store.close()


def test_a_newer_database_is_not_touched(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    Store(url).close()
    engine = engine_for(url)
    with engine.begin() as connection:
        connection.execute(settings.update().values(value="99"))
    engine.dispose()
    with pytest.raises(ConfigurationError, match="made by a newer atoll"):
        Store(url)


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "postgresql://nobody@127.0.0.1:1/x"])
def test_databases_that_cannot_be_used_are_said_so(url):
    with pytest.raises(ConfigurationError, match="database"):
        Store(url)


def test_names_are_ordered_as_python_orders_them(tmp_path):
    """Whatever the database's collation: cohorts are drawn by place."""
    from atoll.service.members import Members

    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    store.lead()
    with store.change() as change:
        for n, name in enumerate(["b", "A", "a", "10", "9", "a b"]):
            change.run(
                sites.insert().values(
                    name=name, key=str(n), role="site", status="active", joined=n, seen=0,
                    examples=n, about="{}",
                )
            )  # fmt: skip
    members = Members(store, lambda: 5.0, presence=10.0)
    members.refresh()
    members.saw("a", 7)
    roster = members.roster(busy={"A"})
    assert list(roster.names) == sorted(["b", "A", "a", "10", "9", "a b"])
    assert roster.examples.tolist() == [3, 4, 1, 7, 5, 0]
    assert [roster.names[m] for m in roster.candidates()] == ["10", "9", "a", "a b", "b"]
    members.write()
    row = store.site("a")
    assert row["examples"] == 7
    assert row["seen"] == 5.0
    store.close()


def test_the_description_names_every_schema_it_refers_to():
    about = description(App(b"", "project", "token").asgi().routes)
    text = json.dumps(about)
    known = set(about["components"]["schemas"])
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= known
    assert about["openapi"] == "3.1.0"


def test_structured_logs_are_one_object_a_line(capsys):
    logger = logging.getLogger("atoll.service")
    before = logging.getLogger("atoll").handlers[:]
    try:
        log_to("json")
        logger.warning("two\nlines \x1b[2J")
        log_to("text")
        logger.warning("two\nlines \x1b[2J")
    finally:
        logging.getLogger("atoll").handlers[:] = before
    first, second = capsys.readouterr().err.splitlines()
    assert json.loads(first)["message"] == "two\nlines \x1b[2J"
    assert json.loads(first)["level"] == "warning"
    assert second.endswith("WARNING two\\nlines \\x1b[2J")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\x00"])
def test_an_approval_that_is_cut_short_says_nothing_yet(tmp_path, text):
    from atoll.site.terms import _answer

    assert _answer(tmp_path / "approved.json") is None
    (tmp_path / "approved.json").write_text(text)
    assert _answer(tmp_path / "approved.json") is None
    (tmp_path / "approved.json").write_text('{"a": 1}')
    assert _answer(tmp_path / "approved.json") == {"a": 1}
