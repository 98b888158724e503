"""Operators' verbs are one program: by state folder and over HTTP they say and leave the same."""

from __future__ import annotations

import json
import re
from contextlib import closing
from hashlib import sha256

import numpy as np
import pytest
import sqlalchemy as sa

pytest.importorskip("sklearn")
from attacker import Inner, Insider, error_of, packed

from atoll.cli import main
from atoll.cli.files import read_plan
from atoll.protocol import messages
from atoll.protocol.identity import make_key
from atoll.rounds.describe import plan_digest
from atoll.service import operations
from atoll.service.storage import tables, visits
from atoll.service.storage.database import Store
from atoll.service.storage.folder import StateFolder
from atoll.site.connection import Connection

SCHEDULE = "Synchronous(rounds=3, cohort=2, minimum=2, pause=0.0)"


@pytest.fixture
def plan(place):
    place.write(schedule=SCHEDULE)
    return read_plan(str(place.root / "federation.py"))


@pytest.fixture
def served(tmp_path, plan):
    """Makes servers in this process, each with an admin, an analyst, a site and an invited one."""
    made = []

    def make(name):
        inner = Inner(tmp_path / name, plan)
        made.append(inner)
        inner.admin = inner.insider("root", "admin").open()
        inner.analyst = inner.insider("ann", "analyst").open()
        inner.member = inner.insider("alice").open()
        inner.token = inner.invite("ghost")
        return inner

    yield make
    for inner in made:
        if inner._thread.is_alive():
            inner.close()


@pytest.fixture
def store(tmp_path):
    with closing(Store(f"sqlite:///{tmp_path / 'store.db'}")) as made:
        yield made


def rows(inner):
    """What an operation may leave, apart from times, secrets and who did it."""
    with closing(inner.folder.store()) as kept:
        return {
            "sites": [(row["name"], row["role"], row["status"]) for row in kept.sites()],
            "tokens": sorted(
                (row["name"], row["role"], row["used"] is None)
                for row in kept.rows(sa.select(tables.tokens))
            ),
            "visits": sorted(row["kind"] for row in kept.rows(sa.select(tables.visits))),
            "stop": bool(kept.setting("stop")),
        }


VERBS = {
    "revoke a site": ("revoke", "alice", "/v1/sites/alice/revoke"),
    "revoke an invitation": ("revoke", "ghost", "/v1/sites/ghost/revoke"),
    "revoke a visitor": ("revoke", "ann", "/v1/sites/ann/revoke"),
    "revoke twice": ("revoke", "gone", "/v1/sites/gone/revoke"),
    "stop": ("stop", None, "/v1/stop"),
    "page": ("page", None, "/v1/page"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_operation_leaves_the_same_rows_either_way(served, verb):
    name, about, target = VERBS[verb]
    found, logged = [], []
    for way in ("folder", "http"):
        inner = served(way)
        inner.insider("gone", "analyst")
        assert main(["revoke", str(inner.state), "gone"]) == 0
        assert inner.analyst.ask("POST", "/v1/page").status == 200
        before, length = rows(inner), len(inner.audit())
        if way == "http":
            assert inner.admin.ask("POST", target).status in (200, 204)
        else:
            inner.close()  # whose tick must not be among what is compared
            assert main([name, str(inner.state), *([about] if about else [])]) == 0
        found.append(rows(inner))
        assert found[-1] != before or verb == "revoke twice"
        logged.append([{**line, "actor": ""} for line in inner.audit()[length:]])
    assert found[0] == found[1]
    assert logged[0] == logged[1] and len(logged[0]) == 1


@pytest.mark.parametrize("way", ["folder", "http"])
def test_a_revoked_invitation_is_void(served, way):
    inner = served("one")
    if way == "folder":
        assert main(["revoke", str(inner.state), "ghost"]) == 0
    else:
        assert inner.admin.ask("POST", "/v1/sites/ghost/revoke").status == 204
    answer = Insider(inner, "ghost").enrol(inner.token)
    assert answer.status == 401 and "there is no such token" in error_of(answer)
    # And nothing is left of it.
    assert main(["revoke", str(inner.state), "ghost"]) == 1
    assert inner.admin.ask("POST", "/v1/sites/ghost/revoke").status == 404
    actor = {line["actor"] for line in inner.audit() if line["event"] == "revoked"}
    assert len(actor) == 1 and actor.pop().startswith("operator" if way == "folder" else "root")


def test_a_revoked_site_is_out_whichever_way(served):
    inner = served("one")
    other = inner.insider("bob").open()
    orders = inner.member.assignment(), other.assignment()
    assert main(["revoke", str(inner.state), "alice"]) == 0
    assert inner.admin.ask("POST", "/v1/sites/bob/revoke").status == 204
    for site, order in zip((inner.member, other), orders, strict=True):
        assert site.ask("POST", "/v1/checkin", site.greeting()).status == 403
        data = packed({"delta": np.zeros(1, np.float32)})
        assert site.offer(order["assignment"], len(data), sha256(data).hexdigest()).status == 403
    # The loop has heard of it, and goes on with two others.
    others = [inner.insider(name).open() for name in ("carol", "dave")]
    others[0].order()
    assert {site.assignment()["round"] for site in others} == {1}
    assert inner.failed is None
    with closing(inner.folder.store()) as kept:
        states = {row["site"]: row["state"] for row in kept.rows(sa.select(tables.assignments))}
    assert states["carol"] == states["dave"] == "open"
    assert {states["alice"], states["bob"]} <= {"lost", "spared"}


def test_an_unknown_name_is_one_sentence(served, capsys):
    inner = served("one")
    assert main(["revoke", str(inner.state), "nobody"]) == 1
    said = capsys.readouterr().err.strip()
    answer = inner.admin.ask("POST", "/v1/sites/nobody/revoke")
    assert answer.status == 404
    assert said == f"atoll: {error_of(answer)}" == "atoll: there is no site 'nobody'"
    assert main(["revoke", str(inner.state), "../up"]) == 1
    assert "cannot be a site's name" in capsys.readouterr().err


def test_only_admins_act(served):
    inner = served("one")
    before = rows(inner)
    for who in (inner.analyst, inner.member):
        for target in ("/v1/sites/alice/revoke", "/v1/sites/ghost/revoke", "/v1/stop"):
            answer = who.ask("POST", target)
            assert answer.status == 403 and "for the role admin" in error_of(answer)
    assert inner.member.ask("POST", "/v1/page").status == 403
    assert rows(inner) == before


def told(capsys, inner, *words):
    capsys.readouterr()
    assert main([words[0], str(inner.state), *words[1:], "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_is_seen_is_the_same_either_way(served, capsys):
    inner = served("one")
    pair = inner.member, inner.insider("bob").open()
    zeros = inner.plan.learner.layout.zeros()["params"]
    for site in pair:
        order = site.assignment()
        assert site.upload(order["assignment"], packed({"delta": zeros})).status == 200
    later = [site.assignment(but=order["assignment"]) for site in pair]
    assert [order["round"] for order in later] == [2, 2]

    def asked(name):
        return json.loads(inner.analyst.ask("GET", f"/v1/{name}").data)

    (by_folder,), by_http = told(capsys, inner, "status"), asked("status")
    assert list(by_folder) == list(by_http)
    # Seconds go by between the two.
    for found in (by_folder, by_http):
        found["waiting_for"] = re.sub(r"[\d.]+ s", "N s", found["waiting_for"])
    assert by_folder == {**by_http, "project": "inner"}
    assert by_http["at_work"] == ["alice", "bob"] and by_http["server"] == "running"
    found = told(capsys, inner, "rounds")
    assert found == asked("rounds") and [list(row) for row in found] == [list(found[0])] * 2
    assert [(row["round"], row["state"]) for row in found] == [(1, "closed"), (2, "open")]
    assert told(capsys, inner, "rounds", "--since", "1") == asked("rounds?since=1") == found[1:]
    assert asked("rounds?since=2") == []
    found = told(capsys, inner, "sites")
    assert [(row["name"], row["status"]) for row in found] == [
        ("alice", "active"), ("ann", "active"), ("bob", "active"), ("ghost", "invited"),
        ("root", "active"),
    ]  # fmt: skip
    for mine, theirs in zip(found, asked("sites"), strict=True):
        assert list(mine) == list(theirs) and {**mine, "seen": 0} == {**theirs, "seen": 0}
    for since in ("-1", "x", "", "1e3", "9" * 40, "%C2%B2"):
        assert inner.analyst.ask("GET", f"/v1/rounds?since={since}").status == 400


@pytest.mark.slow
def test_the_command_says_the_same_by_folder_and_by_identity(place):
    place.write(schedule="Synchronous(rounds=3, cohort=1)")
    place.serve("--linger", "1")
    for name, role in (("0", "site"), ("ann", "analyst"), ("bob", "admin")):
        token = place.invite(name, "--role", role)
        place.cli("enrol", place.url, "--token", token, "--folder", name)
    place.invite("later")
    plan = read_plan(str(place.root / "federation.py"))
    authority = (place.root / "0" / "ca.pem").read_bytes()
    link = Connection(place.url, authority, make_key(place.root / "0" / "key.pem"), "0")
    link.check_in(messages.CheckIn(plan_digest(plan), plan.learner.layout.digest, 10), 0)
    link.close()
    place.until(lambda: '"at_work": ["0"]' in place.cli("status", "state", "--json"), what="work")
    status = [json.loads(place.cli("status", each, "--json")) for each in ("state", "ann", "bob")]
    assert {tuple(each) for each in status} == {tuple(status[0])}
    for each in status:  # seconds go by between them
        each["waiting_for"] = re.sub(r"[\d.]+ s", "N s", each["waiting_for"])
    assert status[1] == status[2] == status[0]
    for name in ("rounds", "sites"):
        shown = [place.cli(name, each, "--json") for each in ("state", "ann")]
        assert shown[0] == shown[1] and shown[0]
    assert "invited" in place.cli("sites", "ann")
    assert "this is for the role admin" in place.cli("revoke", "ann", "later", check=False)
    assert "there is no site 'x'" in place.cli("revoke", "bob", "x", check=False)
    assert "later is revoked" in place.cli("revoke", "bob", "later")
    assert "later" not in place.cli("sites", "state")
    place.cli("stop", "bob")
    place.until(lambda: place.processes["server"].poll() is not None, what="the end")
    assert json.loads(place.cli("status", "state", "--json"))["phase"] == "stopped"


def test_rounds_come_in_pages_and_all_of_them(store, monkeypatch):
    with store.change(leading=False) as change:
        change.many(
            tables.rounds.insert(),
            [
                {"round": number, "attempt": attempt, "state": "closed", "opened": 0.0,
                 "population": 1}
                for number in range(1, 8) for attempt in (0, 1)
            ],
        )  # fmt: skip
    monkeypatch.setattr(operations, "PAGE", 3)
    pages = [[row["round"] for row in operations.rounds(store, since)] for since in (0, 3, 6, 7)]
    assert pages == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [7, 7], []]


def test_a_command_brings_every_page(tmp_path, monkeypatch, capsys):
    folder = StateFolder.make(tmp_path / "state", "p", ["::1"])
    with closing(folder.store()) as kept, kept.change(leading=False) as change:
        change.many(
            tables.rounds.insert(),
            [
                {"round": n, "attempt": 0, "state": "closed", "opened": 0.0, "population": 1}
                for n in range(1, 8)
            ],
        )
    monkeypatch.setattr(operations, "PAGE", 3)
    assert main(["rounds", str(folder.path), "--json"]) == 0
    found = [json.loads(line)["round"] for line in capsys.readouterr().out.splitlines()]
    assert found == [*range(1, 8)]
    assert main(["rounds", str(folder.path), "--since", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_page_is_at_the_address_that_the_certificate_is_for(tmp_path, capsys):
    state = str(tmp_path / "state")
    assert main(["init", state, "--host", "::1"]) == 0
    assert "https://[::1]:8443 " in capsys.readouterr().out
    assert main(["page", state]) == 0
    assert capsys.readouterr().out.startswith("https://[::1]:8443/page/#")
    assert main(["hosts", state, "fl.example.org", "10.0.0.1"]) == 0
    assert main(["page", state]) == 0
    assert "https://fl.example.org:8443/page/#" in capsys.readouterr().out


def test_a_federation_that_was_not_served_yet_can_be_looked_at(tmp_path, capsys):
    state = str(tmp_path / "state")
    StateFolder.make(tmp_path / "state", "p", ["localhost"]).invite("a", "site", 1.0)
    assert main(["status", state, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "project": "p", "server": "not running", "round": 0, "rounds": None, "phase": "idle",
        "waiting_for": None, "until": None, "silence": None, "sites": 0, "at_work": [],
        "model": None,
    }  # fmt: skip
    assert main(["status", state]) == 0
    assert main(["rounds", state, "--json"]) == 0
    assert main(["sites", state]) == 0
    assert "invited" in capsys.readouterr().out


def test_to_stop_twice_is_to_stop_once(store):
    for who in ("a", "b"):
        with store.change(leading=False) as change:
            operations.stop(change, who)
    found = store.rows(sa.select(tables.audit))
    assert [(row["actor"], row["event"]) for row in found] == [("a", "stop")]


def test_a_site_called_operator_does_not_end_the_operators_visit(store):
    with store.change(leading=False) as change:
        mine = operations.ticket(change, "operator")
        theirs = operations.ticket(change, "operator", "00" * 32)
        change.run(
            tables.sites.insert().values(
                name="operator", key="00" * 32, role="analyst", status="active", joined=0.0,
                seen=0.0, examples=0,
            )
        )  # fmt: skip
        operations.revoke(change, "root", "operator")
        assert visits.exchange(change, theirs) is None
        assert visits.exchange(change, mine) is not None
        assert visits.exchange(change, mine) is None


def test_who_was_revoked_and_invited_again_is_invited(store):
    with store.change(leading=False) as change:
        change.run(
            tables.sites.insert().values(
                name="a", key="00" * 32, role="site", status="revoked", joined=1.0, seen=2.0,
                examples=3,
            )
        )  # fmt: skip
        change.run(
            tables.tokens.insert().values(
                digest="x", name="a", role="analyst", expires=9e9, used=None
            )
        )
    assert operations.sites(store) == [
        {"name": "a", "role": "analyst", "status": "invited", "joined": None, "examples": None,
         "seen": None, "measured": None}
    ]  # fmt: skip
