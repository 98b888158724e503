"""The live page of a served federation: a login by ticket, and a curve without gaps."""

from __future__ import annotations

import json
import signal
import sqlite3
import ssl
import time
import urllib.error
import urllib.request

import pytest
import sqlalchemy as sa

pytest.importorskip("sklearn")
from attacker import Target
from browser import browser, tab, until

from atoll.cli.files import read_plan
from atoll.service.storage import tables
from atoll.service.storage.database import Store
from atoll.tracking import read_run


def ask(place, path, *, body=None, cookie="", kind="application/json", more=None):
    """Status, headers and text of a request from outside."""
    context = ssl.create_default_context(cafile=place.state / "ca.pem")
    headers = {"content-type": kind} | ({"cookie": cookie} if cookie else {})
    headers |= more or {}
    request = urllib.request.Request(place.url + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()
    except urllib.error.URLError:
        return 0, {}, "nobody answers"


def ticket_of(place, folder="state"):
    link = place.cli("page", folder).splitlines()[0]
    return link.rpartition("#")[2]


def analyst(place, name="ann", role="analyst"):
    token = place.cli("invite", "state", name, "--role", role)
    place.cli("enrol", place.url, "--token", token, "--folder", name)


def test_only_tickets_let_in_and_only_once(place):
    place.write(schedule="Synchronous(rounds=2)")
    place.serve("--sites", "1", "--linger", "30")
    place.until(lambda: ask(place, "/health")[0] == 200, what="the server")
    # The page itself holds nothing; what it shows does.
    status, headers, _ = ask(place, "/page/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    for path in ("runs", "runs/federation", "runs/federation/rows", "runs/federation/events"):
        assert ask(place, f"/page/api/{path}")[0] == 401
        assert ask(place, f"/page/api/{path}", cookie="__Host-atoll-00000000=" + "a" * 43)[0] == 401
    analyst(place)
    ticket = ticket_of(place, "ann")
    body = json.dumps({"ticket": ticket}).encode()
    assert ask(place, "/page/login", body=body, kind="text/plain")[0] == 415
    assert ask(place, "/page/login", body=b'{"ticket": "short"}')[0] == 400
    status, headers, _ = ask(place, "/page/login", body=body)
    assert status == 204
    cookie = headers["set-cookie"]
    for flag in ("Secure", "HttpOnly", "SameSite=strict", "Path=/"):
        assert flag.lower() in cookie.lower()
    mine = cookie.partition(";")[0]
    # A ticket is no cookie, and a cookie of another federation's is none here.
    name, _, secret = mine.partition("=")
    assert ask(place, "/page/api/runs", cookie=f"{name}={ticket}")[0] == 401
    assert ask(place, "/page/api/runs", cookie=f"__Host-atoll-other={secret}")[0] == 401
    crossing = {"sec-fetch-site": "cross-site"}
    assert ask(place, "/page/api/runs", cookie=mine, more=crossing)[0] == 403
    assert json.loads(ask(place, "/page/api/runs", cookie=mine)[2])[0]["name"] == "state"
    status, _, text = ask(place, "/page/login", body=body)
    assert status == 401 and "used or is too old" in text
    # A cookie is not a seal: the API of sites and admins does not know it.
    assert ask(place, "/v1/status", cookie=mine)[0] == 401
    assert ask(place, "/v1/stop", body=b"", cookie=mine)[0] == 401
    # Neither secret is on disk, nor in the log.
    known = b"".join(path.read_bytes() for path in place.state.glob("atoll.db*"))
    secret = mine.partition("=")[2]
    for each in (ticket, secret):
        assert each.encode() not in known and each not in place.log("server")
    # Whoever is revoked is shut out, cookie or not.
    place.cli("revoke", "state", "ann")
    place.until(lambda: ask(place, "/page/api/runs", cookie=mine)[0] == 401, what="the revocation")
    # The operator comes in with the state folder, and out by logging out.
    body = json.dumps({"ticket": ticket_of(place)}).encode()
    mine = ask(place, "/page/login", body=body)[1]["set-cookie"].partition(";")[0]
    assert ask(place, "/page/api/runs", cookie=mine)[0] == 200
    assert ask(place, "/page/logout", body=b"", cookie=mine)[0] == 204
    assert ask(place, "/page/api/runs", cookie=mine)[0] == 401
    assert place.cli("audit", "verify", "state")
    shown = place.cli("audit", "show", "state")
    assert "ann: opened the page" in shown and "refused" in shown


@pytest.mark.slow
def test_whoever_is_revoked_hears_no_more(place):
    place.write(schedule="Synchronous(rounds=400)")
    place.serve("--sites", "1", "--linger", "5")
    place.until(lambda: ask(place, "/health")[0] == 200, what="the server")
    analyst(place)
    body = json.dumps({"ticket": ticket_of(place, "ann")}).encode()
    mine = ask(place, "/page/login", body=body)[1]["set-cookie"].partition(";")[0]
    context = ssl.create_default_context(cafile=place.state / "ca.pem")
    request = urllib.request.Request(
        f"{place.url}/page/api/runs/federation/events", headers={"cookie": mine}
    )
    place.join("0", place.invite("0"))
    with urllib.request.urlopen(request, timeout=20, context=context) as stream:
        while not stream.readline().startswith(b"event: round"):
            pass
        place.cli("revoke", "state", "ann")
        ended = time.monotonic() + 15
        while stream.readline():
            assert time.monotonic() < ended, "the stream goes on"


def test_a_federation_that_fails_says_why(place):
    place.write(schedule="Synchronous(rounds=3, minimum=2, deadline=1.0, attempts=30, pause=1.0)")
    place.serve("--sites", "2", "--linger", "30")
    place.until(lambda: ask(place, "/health")[0] == 200, what="the server")
    target = Target(place.url, place.state, read_plan(str(place.root / "federation.py")))
    target.insider("1")  # which is there, and never delivers
    place.join("0", place.invite("0"))
    body = json.dumps({"ticket": ticket_of(place)}).encode()
    mine = ask(place, "/page/login", body=body)[1]["set-cookie"].partition(";")[0]

    def failures():
        text = ask(place, "/page/api/runs/federation/rows", cookie=mine)[2]
        return json.loads(text).get("state", {}).get("failures") if text.startswith("{") else None

    place.until(failures, what="the failure")
    assert failures()[0]["round"] == 1 and "abandoned: " in failures()[0]["text"]


def test_sites_have_no_business_there(place):
    place.write(schedule="Synchronous(rounds=2)")
    place.serve("--sites", "1", "--linger", "30")
    analyst(place, "0", role="site")
    assert "for the role analyst" in place.cli("page", "0", check=False)


@pytest.mark.slow
def test_a_killed_server_leaves_no_gap_in_the_curve(place):
    place.write(schedule="Synchronous(rounds=30)")
    place.serve("--sites", "3", "--linger", "60")
    place.until(lambda: ask(place, "/health")[0] == 200, what="the server")
    link = f"{place.url}/page/#{ticket_of(place)}"
    with browser() as started, tab(started, link, ignore_https_errors=True) as page:
        until(page, "!$('main').hidden", 20)
        assert "#" not in page.url
        tokens = {name: place.invite(name) for name in ("0", "1", "2")}
        for name, token in tokens.items():
            place.join(name, token)
        until(page, "rows.length >= 5", 60)
        assert page.text_content("#name") == "state"
        place.processes["server"].send_signal(signal.SIGKILL)
        place.processes["server"].wait()
        until(page, "$('status').textContent === 'reconnecting'")
        time.sleep(1.5)
        place.serve("--sites", "3", "--linger", "60")
        until(page, "rows.length === 30", 90)
        # The same visit, the same stream of rounds: none is missing and none is twice.
        assert page.evaluate("rows.map((row) => row.round)") == list(range(1, 31))
        # The server leaves when every site knows; whoever comes later may look all the same.
        until(page, "$('status').textContent === 'finished'", 5)
        assert place.wait("server", 60) == 0, place.log("server")
        place.serve("--sites", "3", "--linger", "60")
        place.until(lambda: ask(place, "/health")[0] == 200, what="the server")
        page.reload()
        until(page, "clients.length === 3 && clients.every((c) => c.accepted + c.missed >= 30)", 30)
        assert page.evaluate("charts.get('part-chart').plot.data[2]") == [3] * 30
        shown = page.evaluate("rows.map((row) => row.measurements.train_loss)")
        database = sqlite3.connect(place.state / "atoll.db")
        kept = database.execute("SELECT record FROM rounds WHERE state = 'closed' ORDER BY round")
        assert shown == [json.loads(text)["measurements"]["train_loss"] for (text,) in kept]
        database.close()
        # And so has the run folder, which was written anew in between.
        history = read_run(place.state).history
        assert [record.round for record in history] == list(range(1, 31))
        assert [record.measurements["train_loss"] for record in history] == shown
        assert page.evaluate("Object.keys(rows[0].phases)") == ["clients", "step", "evaluation"]
        page.focus("#slider")
        page.keyboard.press("ArrowLeft")
        until(page, "$('round-parts').innerText.includes('accepted (3): 0, 1, 2')")
        assert "last seen" in page.inner_text("#clients")


def test_an_older_database_is_brought_up_to_date(tmp_path):
    url = f"sqlite:///{tmp_path}/old.db"
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        older = [t for t in tables.metadata.sorted_tables if t.name not in ("visits", "measured")]
        tables.metadata.create_all(connection, tables=older)
        connection.execute(tables.settings.insert().values(name="format", value="1"))
        connection.execute(
            tables.sites.insert().values(
                name="a", key="k", role="site", status="active", joined=1.0, seen=1.0
            )
        )
    engine.dispose()
    store = Store(url)
    found = sa.inspect(store._engine)
    assert found.has_table("visits") and store.site("a")["key"] == "k"
    names = {index["name"] for index in found.get_indexes("assignments")}
    assert {"assignments_round", "assignments_counted"} <= names
    assert store.setting("format") == 5
    assert found.has_table("measured")
    store.close()
    # Nothing is done twice.
    Store(url).close()
