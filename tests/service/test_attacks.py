"""Attacks on a real server: each is refused with its status, counted and audited; work goes on."""

from __future__ import annotations

import json
import random
import re
import socket
import sqlite3
import ssl
import threading
import time
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import schemathesis
import urllib3
from attacker import (
    Inner,
    Insider,
    SealAuth,
    Target,
    drain,
    error_of,
    packed,
    request_bytes,
    sealed_target,
    status_of,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from test_chaos import postgresql

from atoll.aggregation.stage import Schema
from atoll.aggregation.validate import validate
from atoll.cli import main
from atoll.cli.files import read_plan
from atoll.core import safetensors
from atoll.core.model_file import load_model
from atoll.errors import ConfigurationError, UpdateRefused
from atoll.protocol import messages
from atoll.protocol.certificates import (
    client_context,
    make_authority,
    make_server,
    server_context,
)
from atoll.protocol.identity import IdentityError, Token, public_key
from atoll.rounds.messages import largest, unpack
from atoll.service.http import bodies
from atoll.service.storage.folder import StateFolder
from atoll.site.connection import Connection, find_authority

pytest.importorskip("sklearn")
SCHEDULE = "Synchronous(rounds=3, cohort=2, minimum=2, attempts=1000, pause=0.0)"


@pytest.fixture(scope="module")
def real(request, tmp_path_factory):
    """The folder and processes of a served federation."""
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parent / "conftest.py"))
    made = conftest.Place(tmp_path_factory.mktemp("arena"))
    made.write(schedule=SCHEDULE)
    made.cli("init", "state", "--host", "127.0.0.1")
    made.serve("--linger", "20")
    made.until(lambda: "leading" in made.log("server"), what="the server's start")
    yield made
    made.close()


@pytest.fixture(scope="module")
def arena(real):
    """A real server, over TLS."""
    target = Target(real.url, real.state, read_plan(str(real.root / "federation.py")))
    yield target
    target.close()


@pytest.fixture(scope="module")
def mallory(arena):
    """A site that has joined, and is up to no good."""
    return arena.insider("mallory").open()


@pytest.fixture(scope="module")
def victim(arena, mallory):
    """A site that has joined; with it there are the two that a round needs."""
    return arena.insider("victim").open()


@pytest.fixture(scope="module")
def analyst(arena):
    return arena.insider("ana", "analyst").open()


@pytest.fixture(scope="module")
def admin(arena):
    return arena.insider("root", "admin").open()


@pytest.fixture(scope="module")
def inner(real, tmp_path_factory):
    """A server in this process, of the same federation, for what takes time or may be fatal."""
    plan = read_plan(str(real.root / "federation.py"))
    made = Inner(tmp_path_factory.mktemp("inner"), plan)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(inner):
    """The two sites of the server in this process."""
    return inner.insider("eve").open(), inner.insider("bob").open()


@pytest.fixture
def doomed(tmp_path, real):
    """A server in this process for one test, which may be its end, and a site of it."""
    made = Inner(tmp_path, read_plan(str(real.root / "federation.py")))
    eve, bob = made.insider("eve").open(), made.insider("bob").open()
    bob.order()
    yield made, eve
    made.close()


def delta(plan, fill=0.25):
    return {"delta": np.full(plan.learner.layout.zeros()["params"].shape, fill, np.float32)}


def flat(plan):
    """The same, under the names by which arrays travel."""
    return {f"vectors/{name}": vector for name, vector in delta(plan).items()}


@contextmanager
def answering(target, status):
    """What is done within is answered, and counted, with this status."""
    before = target.answered(status)
    yield
    assert target.answered(status) > before, f"no {status} was counted"


# EnrolmentApi.


@pytest.mark.parametrize("hours", [0.0, 1e-9, -1.0])
def test_an_expired_token_is_refused(arena, hours):
    token = arena.invite("late", "analyst", hours)
    with arena.refusing("enrolment", "127.0.0.1"):
        answer = Insider(arena, "late").enrol(token)
    assert answer.status == 401
    assert "has expired" in error_of(answer)


def test_a_token_is_good_once(arena):
    token = arena.invite("once", "analyst")
    first = Insider(arena, "once")
    assert first.enrol(token).status == 200
    assert first.enrol(token).status == 200  # its answer was lost
    with arena.refusing("enrolment"):
        answer = Insider(arena, "once").enrol(token)
    assert answer.status == 401
    assert "used before" in error_of(answer)
    assert first.answer().status == 200


def test_a_forged_token_is_refused(arena):
    with arena.refusing("enrolment"):
        answer = Insider(arena, "x").enrol(Token.fresh("00" * 32))
    assert answer.status == 401
    assert "no such token" in error_of(answer)


def test_a_token_signed_by_another_key_is_refused_and_stays_good(arena):
    token = arena.invite("signed", "analyst")
    who = Insider(arena, "signed")
    with arena.refusing("enrolment"):
        answer = who.enrol(token, signer=Ed25519PrivateKey.generate())
    assert answer.status == 401
    assert "signature" in error_of(answer)
    assert who.enrol(token).status == 200


def test_one_key_cannot_have_two_names(arena):
    """Whoever is invited twice must not become two sites."""
    first = Insider(arena, "twin-a")
    assert first.enrol(arena.invite("twin-a", "analyst")).status == 200
    with arena.refusing("enrolment"):
        answer = Insider(arena, "twin-b", first.key).enrol(arena.invite("twin-b", "analyst"))
    assert answer.status in (401, 403, 409)
    assert error_of(answer)


def test_a_later_invitation_makes_the_earlier_token_void(arena):
    old, new = arena.invite("again", "analyst"), arena.invite("again", "analyst")
    assert Insider(arena, "again").enrol(old).status == 401
    assert Insider(arena, "again").enrol(new).status == 200


@pytest.mark.parametrize("text", ["", "atoll-", "atoll-AAAA", "atoll-é", "x" * 10_000, "\0"])
def test_text_that_is_no_token(text):
    with pytest.raises(IdentityError, match="not an enrolment token"):
        Token.read(text)


def test_a_session_needs_the_sites_own_key(arena, mallory, victim):
    thief = Insider(arena, "victim", mallory.key)
    with arena.refusing("session"):
        answer = thief.answer()
    assert answer.status == 401
    assert error_of(answer)


def test_nobody_learns_who_has_joined(arena, mallory, victim):
    """A site that is not there is challenged and refused like one that is."""
    answers = [Insider(arena, name, mallory.key).answer() for name in ("victim", "nobody")]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.data for answer in answers}) == 1


def test_an_answer_to_a_challenge_is_good_once(arena, mallory, victim):
    asked = arena.ask("POST", "/v1/challenge", {"site": "mallory"})
    nonce = json.loads(asked.data)["nonce"]
    assert mallory.answer(nonce=nonce).status == 200
    with arena.refusing("session"):
        assert mallory.answer(nonce=nonce).status == 401
    # A number that was asked of another site.
    other = json.loads(arena.ask("POST", "/v1/challenge", {"site": "victim"}).data)["nonce"]
    assert mallory.answer(nonce=other).status == 401
    assert mallory.answer(nonce="00" * 32).status == 401


# Seals.


def test_a_forged_seal_is_refused(arena, mallory):
    body = json.dumps(mallory.greeting()).encode()
    good = mallory.headers("POST", "/v1/checkin?wait=0", body)
    other = sha256(b"not this").hexdigest()
    for changed in (
        {"Atoll-Seal": other},
        {"Atoll-Seal": ""},
        {"Atoll-Seal": good["Atoll-Seal"].upper() + "0"},
        {"Atoll-Counter": str(int(good["Atoll-Counter"]) + 1)},
        {"Atoll-Counter": ""},
        {"Atoll-Counter": "-1"},
        {"Atoll-Counter": "1e3"},
        {"Atoll-Counter": "9" * 5000},
        {"Atoll-Counter": "\u00b2"},
    ):
        with arena.refusing("seal", "mallory"):
            answer = arena.ask("POST", "/v1/checkin?wait=0", body, {**good, **changed})
        assert answer.status == 401, changed
        assert "seal" in error_of(answer)
    # The good one was not used up by any of them.
    assert arena.ask("POST", "/v1/checkin?wait=0", body, good).status == 200


def test_a_seal_that_is_not_ascii_is_refused(arena, mallory):
    good = mallory.headers("GET", "/v1/status")
    with arena.refusing("seal"):
        answer = arena.ask("GET", "/v1/status", headers={**good, "Atoll-Seal": "\u00e9" * 64})
    assert answer.status == 401


def test_a_seal_covers_method_target_and_body(arena, mallory):
    body = json.dumps(mallory.greeting()).encode()
    for method, target, sent in (
        ("POST", "/v1/checkin?wait=1", body),
        ("POST", "/v1/checkin?wait=0", body.replace(b'"plan"', b'"plan" ')),
        ("POST", "/v1/checkin?wait=0", None),
        ("POST", "/v1/uploads", body),
        ("POST", "/v1/stop", body),
        ("GET", "/v1/status", None),
    ):
        sealed = mallory.headers("POST", "/v1/checkin?wait=0", body)
        with arena.refusing("seal", "mallory"):
            answer = arena.ask(method, target, sent, sealed)
        assert answer.status == 401, (method, target)


def test_a_forged_session_is_refused(arena, mallory):
    sealed = mallory.headers("POST", "/v1/checkin?wait=0", b"{}")
    for session in ("", "00" * 16, "x" * 5000, "\u00e9"):
        with answering(arena, 401):
            answer = arena.ask(
                "POST", "/v1/checkin?wait=0", b"{}", {**sealed, "Atoll-Session": session}
            )
        assert answer.status == 401
        assert "session" in error_of(answer)
    assert arena.ask("POST", "/v1/checkin?wait=0", b"{}").status == 401


def test_a_replayed_request_is_refused(arena, mallory):
    body = json.dumps(mallory.greeting()).encode()
    sealed = mallory.headers("POST", "/v1/checkin?wait=0", body)
    assert arena.ask("POST", "/v1/checkin?wait=0", body, sealed).status == 200
    with arena.refusing("replay", "mallory"):
        answer = arena.ask("POST", "/v1/checkin?wait=0", body, sealed)
    assert answer.status == 409
    assert "before" in error_of(answer)
    # One so old that the window no longer knows it.
    old = mallory.headers("POST", "/v1/checkin?wait=0", body)
    mallory.counter += 100
    assert mallory.order()["kind"]
    with arena.refusing("replay", "mallory"):
        assert arena.ask("POST", "/v1/checkin?wait=0", body, old).status == 409


def test_a_session_makes_way_for_newer_ones(arena):
    who = arena.insider("many", "analyst").open()
    sealed = who.headers("GET", "/v1/status")
    for _ in range(4):
        assert who.answer().status == 200
    assert arena.ask("GET", "/v1/status", headers=sealed).status == 401
    assert who.open().ask("GET", "/v1/status").status == 200


def test_a_session_ends(inner):
    who = inner.insider("hour", "analyst").open()
    sealed = who.headers("GET", "/v1/status")
    inner.app.sessions._sessions[who.session].expires = time.monotonic() - 1
    assert inner.ask("GET", "/v1/status", headers=sealed).status == 401
    assert who.session not in inner.app.sessions._sessions


# Roles, and those who are no longer welcome.


def test_a_site_may_not_look_around_or_stop(arena, mallory):
    for method, target in (
        ("GET", "/v1/status"),
        ("GET", "/v1/rounds"),
        ("GET", "/v1/sites"),
        ("POST", "/v1/stop"),
        ("POST", "/v1/sites/victim/revoke"),
    ):
        with arena.refusing("role", "mallory"):
            answer = mallory.ask(method, target)
        assert answer.status == 403, target
        assert "role" in error_of(answer)


def test_an_analyst_reads_and_does_no_more(arena, analyst):
    for name in ("status", "rounds", "sites"):
        answer = analyst.ask("GET", f"/v1/{name}")
        assert answer.status == 200
        # No key, token or seed is in what is shown.
        assert not re.search(rb'"(key|secret|seed|digest)"', answer.data)
    for method, target, body in (
        ("POST", "/v1/stop", b""),
        ("POST", "/v1/sites/victim/revoke", b""),
        ("POST", "/v1/checkin?wait=0", analyst.greeting()),
        ("POST", "/v1/uploads", {"assignment": "1.0.0", "size": 1, "sha256": "00" * 32}),
        ("POST", "/v1/assignments/1.0.0/fail", {"reason": "x"}),
        ("HEAD", "/v1/uploads/" + "0" * 32, b""),
    ):
        with arena.refusing("role", "ana"):
            assert analyst.ask(method, target, body).status == 403, target


def test_an_admin_may_revoke_and_the_next_request_is_refused(arena, admin):
    site = arena.insider("outcast", "analyst").open()
    assert site.ask("GET", "/v1/status").status == 200
    assert admin.ask("GET", "/v1/status").status == 200
    assert admin.ask("POST", "/v1/sites/no-such-site/revoke").status == 404
    assert admin.ask("POST", "/v1/sites/outcast/revoke").status == 204
    with arena.refusing("revoked", "outcast"):
        answer = site.ask("GET", "/v1/status")
    assert answer.status == 403
    assert "revoked" in error_of(answer)
    with arena.refusing("session"):
        answer = site.answer()
    assert answer.status == 403
    assert any(each["event"] == "revoked" and each["actor"] == "root" for each in arena.audit())


def test_an_old_session_stays_closed_when_its_name_is_given_anew(arena, admin):
    """The key was stolen: its site is revoked and invited again. The thief's session is over."""
    thief = arena.insider("stolen", "analyst").open()
    assert admin.ask("POST", "/v1/sites/stolen/revoke").status == 204
    owner = arena.insider("stolen", "analyst").open()
    assert owner.ask("GET", "/v1/status").status == 200
    answer = thief.ask("GET", "/v1/status")
    assert answer.status in (401, 403)


def test_an_admin_may_stop(tmp_path, arena):
    with closing(Inner(tmp_path, arena.plan)) as inner:
        assert inner.insider("site").ask("POST", "/v1/stop").status == 403
        assert not inner.loop.stopping
        assert inner.insider("root", "admin").ask("POST", "/v1/stop").status == 204
        assert inner.loop.stopping


# Other sites' work.


def test_another_sites_assignment_cannot_be_touched(arena, mallory, victim):
    order = victim.assignment()
    data = packed(delta(arena.plan))
    digest = sha256(data).hexdigest()
    with arena.refusing("upload", "mallory"):
        answer = mallory.offer(order["assignment"], len(data), digest)
    assert answer.status == 403
    assert "not mallory's" in error_of(answer)
    with arena.refusing("upload", "mallory"):
        assert mallory.offer("999.0.1", 1, digest).status == 403
    answer = mallory.ask("POST", f"/v1/assignments/{order['assignment']}/fail", {"reason": "ha"})
    assert answer.status in (403, 410)
    assert error_of(answer)
    target = victim.offer(order["assignment"], len(data), digest).headers["Location"]
    with arena.refusing("upload", "mallory"):
        answer = mallory.patch(target, 0, data)
    assert answer.status == 403
    assert "another site's" in error_of(answer)
    with arena.refusing("upload", "mallory"):
        assert mallory.ask("HEAD", target).status == 403
    # It is as it was, and taken from the one whose it is.
    assert victim.ask("HEAD", target).headers["Upload-Offset"] == "0"
    answer = victim.patch(target, 0, data)
    assert (answer.status, json.loads(answer.data)["verdict"]) == (200, "accepted")
    # Nobody may fetch what another has sent.
    assert mallory.ask("GET", f"/v1/blobs/{digest}").status == 404
    # The same once more is no second update, and another in its place is none at all.
    again = victim.offer(order["assignment"], len(data), digest)
    assert json.loads(again.data)["verdict"] == "duplicate"
    other = victim.upload(order["assignment"], packed(delta(arena.plan, 9.0)))
    assert json.loads(other.data)["verdict"] == "duplicate"


# What is in a body.


BAD_JSON = {
    "empty": b"",
    "garbage": b"\xff\xfe\x00",
    "not an object": b"[1, 2]",
    "nothing": b"null",
    "cut off": b'{"site": "mal',
    "two": b'{"site":"a"}{"site":"b"}',
    "unknown field": b'{"site": "mallory", "role": "admin"}',
    "wrong type": b'{"site": 1}',
    "path": b'{"site": "../../etc/passwd"}',
    "not ASCII": '{"site": "Mällory"}'.encode(),
    "NUL": b'{"site": "mal\\u0000lory"}',
    "newline": b'{"site": "mallory\\n"}',
    "surrogate": b'{"site": "\\ud800"}',
    "long": b'{"site": "' + b"a" * 65 + b'"}',
    "very long": b'{"site": "' + b"a" * 60_000 + b'"}',
    "deep": b"[" * 60_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep field": b'{"site": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "NaN": b'{"site": NaN}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
def test_a_message_that_is_not_of_its_schema_is_refused(arena, body):
    with arena.refusing("message", audited=False):
        answer = arena.ask("POST", "/v1/challenge", body)
    assert answer.status == 400
    assert "Challenge" in error_of(answer)
    assert len(answer.data) < 2000


@pytest.mark.parametrize(
    "changed",
    [
        {"examples": -1}, {"examples": 2**60}, {"examples": 1.5}, {"examples": "3"},
        {"busy": "1.2"}, {"busy": "../../x"}, {"busy": "1.0.1\n"}, {"farewell": 1},
        {"about": {"a": 1}}, {"about": {"a" * 65: "b"}}, {"about": {"a": "b" * 257}},
        {"about": [[]]}, {"plan": "00"}, {"plan": "00" * 32 + "\n"}, {"layout": None},
        {"role": "admin"},
    ],
    ids=lambda changed: repr(changed)[:30],
)  # fmt: skip
def test_a_sealed_message_that_is_not_of_its_schema_is_refused(arena, mallory, changed):
    with arena.refusing("message", audited=False):
        answer = mallory.ask("POST", "/v1/checkin?wait=0", mallory.greeting(**changed))
    assert answer.status == 400
    assert "CheckIn" in error_of(answer)


@pytest.mark.parametrize("size", [0, -1, 2**60, 10**30, 1.5, "1", None, True, float("nan")])
def test_a_size_that_is_none_is_refused(arena, mallory, size):
    with arena.refusing("message", audited=False):
        answer = mallory.offer("1.0.0", size, "00" * 32)
    assert answer.status == 400


@pytest.mark.parametrize("wait", ["nan", "inf", "-1", "1e9", "x", "", "1;2", "٣" * 3])
def test_a_wait_that_is_none_is_refused(arena, mallory, victim, wait):
    body = json.dumps(mallory.greeting()).encode()
    mallory.assignment()
    path = f"/v1/checkin?wait={wait}"
    raw = request_bytes("POST", path.encode().decode("latin-1"), {
        **mallory.headers("POST", path, body), "Connection": "close",
    }, body)  # fmt: skip
    # What is beyond ASCII is not a request to begin with.
    assert status_of(arena.raw(raw)) in ((200,) if wait == "٣٣٣" else ()) + (400,)


def test_key_with_something_behind_it_is_refused(arena):
    who, token = Insider(arena, "tail"), arena.invite("tail", "analyst")
    signature = who.key.sign(b"atoll enrol " + bytes.fromhex(token.secret)).hex()
    good = {"secret": token.secret, "key": public_key(who.key), "signature": signature}
    for name, value in good.items():
        answer = arena.ask("POST", "/v1/enrol", {**good, name: value + "\n"})
        assert answer.status == 400, name
    assert arena.ask("POST", "/v1/enrol", good).status == 200


@pytest.mark.parametrize("path", ["/v1/challenge", "/v1/enrol", "/v1/session", "/v1/checkin"])
def test_a_message_of_more_than_64_kib_is_refused(arena, path):
    body = b'{"site": "' + b"a" * (1 << 16) + b'"}'
    with answering(arena, 413):
        answer = arena.ask("POST", path, body)
    assert answer.status == 413
    assert "65536" in error_of(answer)


def test_a_message_that_claims_to_be_huge_is_not_waited_for(arena):
    huge = {"Content-Length": str(1 << 50)}
    text = arena.raw(request_bytes("POST", "/v1/challenge", huge, b"x" * 70_000))
    assert status_of(text) == 413
    huge = {"Content-Length": "9" * 40}
    assert status_of(arena.raw(request_bytes("POST", "/v1/challenge", huge, b"x" * 70))) == 400


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x" * 500])
def test_a_compressed_body_is_refused_unopened(arena, mallory, encoding):
    bomb = b"\x1f\x8b" + b"\0" * 1000
    with answering(arena, 415):
        answer = mallory.ask("POST", "/v1/uploads", bomb, {"Content-Encoding": encoding})
    assert answer.status == 415
    assert error_of(answer)


def test_another_copy_of_the_federation_is_refused_with_both_digests(arena, mallory):
    theirs = "ab" * 32
    for what in ("plan", "layout"):
        ours = mallory.greeting()[what]
        with arena.refusing("mismatch", audited=False):
            answer = mallory.ask("POST", "/v1/checkin", mallory.greeting(**{what: theirs}))
        assert answer.status == 409
        problem = json.loads(answer.data)
        assert what in problem["error"]
        assert problem["detail"].items() >= {"site's": theirs, "server's": ours}.items()
        assert json.loads(problem["detail"]["plan"]).keys() >= {"learner", "algorithm"}


# Uploads.


def test_an_offer_of_a_huge_update_is_refused(arena, mallory, victim):
    order = mallory.assignment()
    for size in (2**47, largest(arena.plan.schema) + 1):
        with arena.refusing("upload", "mallory"):
            answer = mallory.offer(order["assignment"], size, "00" * 32)
        assert answer.status == 413
        assert str(size) in error_of(answer)


def test_bytes_that_are_not_those_declared_are_refused(arena, mallory, victim):
    order = mallory.assignment()
    data = packed(delta(arena.plan))
    offered = mallory.offer(order["assignment"], len(data), sha256(b"other").hexdigest())
    target = offered.headers["Location"]
    with arena.refusing("upload", "mallory"):
        answer = mallory.patch(target, 0, data)
    assert answer.status == 422
    assert "SHA-256" in error_of(answer)
    assert answer.headers["Upload-Offset"] == "0"
    # A digest is tied to its size too, and more than was declared is not kept.
    offered = mallory.offer(order["assignment"], 100, sha256(data).hexdigest())
    target = offered.headers["Location"]
    with arena.refusing("upload", "mallory"):
        assert mallory.patch(target, 0, data).status == 413
    head = mallory.ask("HEAD", target)
    assert int(head.headers["Upload-Offset"]) <= 100
    assert not list((arena.state / "incoming").glob("*.part")) or all(
        path.stat().st_size <= 100 for path in (arena.state / "incoming").glob("*.part")
    )


def test_an_upload_goes_on_only_where_it_stands(arena, mallory, victim):
    order = mallory.assignment()
    data = packed(delta(arena.plan))
    offered = mallory.offer(order["assignment"], len(data), sha256(data).hexdigest())
    target = offered.headers["Location"]
    assert mallory.patch(target, 0, data[:1000]).status == 204
    for at in (0, 999, 1001, -1, 2**70, "x", "", "0x0", "+1000", "1000.0"):
        with answering(arena, 409):
            answer = mallory.patch(target, at, data[1000:])
        assert answer.status == 409
        assert answer.headers["Upload-Offset"] == "1000"
    # A length that was not sealed.
    sealed = mallory.headers("PATCH", target, "1000:5")
    with arena.refusing("seal", "mallory"):
        answer = arena.ask("PATCH", target, data[1000:], {**sealed, "Upload-Offset": "1000"})
    assert answer.status == 401
    assert mallory.ask("HEAD", target).headers["Upload-Offset"] == "1000"


def header_of(entries, body=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + body


def bad_updates(plan):
    """Updates that are none, and a word of why each is refused."""
    good = delta(plan)["delta"]
    size = len(good)

    def filled(value):
        vector = good.copy()
        vector[size // 2] = value
        return vector

    def entry(dtype="F32", shape=(size,), offsets=(0, 4 * size)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    def bare(arrays, about=(("weight", "1.0"),)):
        return b"".join(bytes(p) for p in safetensors.encode(arrays, dict(about)))

    def raw(vectors, **about):
        arrays = {f"vectors/{name}": vector for name, vector in vectors.items()}
        return bare(arrays, {"weight": "1.0", **about})

    return {
        "nan": (packed({"delta": filled(np.nan)}), "NaN"),
        "infinite": (packed({"delta": filled(-np.inf)}), "infinite"),
        "longer": (packed({"delta": np.append(good, good[:1])}), "asked for"),
        "shorter": (packed({"delta": good[:-1]}), "asked for"),
        "matrix": (raw({"delta": good.reshape(1, -1)}), "asked for"),
        "doubles": (raw({"delta": good.astype(np.float64)}), "float64"),
        "integers": (raw({"delta": good.astype(np.int64)}), "int64"),
        "other name": (raw({"params": good}), "asked for"),
        "no arrays": (raw({}), "asked for"),
        "one more": (raw({"delta": good, "extra": good}), "asked for"),
        "path as name": (raw({"../../x": good}), "asked for"),
        "newline as name": (raw({"a\nb\x1b[2J": good}), "not printable"),
        "of nobody": (bare({"delta": good}), "neither vectors nor statistics"),
        "statistics": (bare({"vectors/delta": good, "statistics/buffers": good}), "asked for"),
        "no weight": (bare({"vectors/delta": good}, ()), "weight"),
        "weight nan": (raw({"delta": good}, weight="nan"), "weight"),
        "weight zero": (raw({"delta": good}, weight="0"), "weight"),
        "weight negative": (raw({"delta": good}, weight="-1"), "weight"),
        "weight huge": (raw({"delta": good}, weight="1e300"), "weight"),
        "weight words": (raw({"delta": good}, weight="lots"), "weight"),
        "many metrics": (
            raw({"delta": good}, **{f"metric/m{n}": "0" for n in range(65)}), "metrics"
        ),
        "metric of nobody": (raw({"delta": good}, loss="0"), "neither metrics nor shares"),
        "metric out of range": (raw({"delta": good}, **{"metric/steps": "-1"}), "not from 0"),
        "metric words": (raw({"delta": good}, **{"metric/steps": "lots"}), "not a number"),
        "half a share": (raw({"delta": good}, **{"share/delta": "0.5"}), "may not be left out"),
        "no share": (raw({}, **{"share/delta": "0"}), "may not be left out"),
        "garbage": (random.Random(0).randbytes(1000), "message"),
        "one byte": (b"\0", "message"),
        "cut off": (packed({"delta": good})[:-100], "cut off"),
        "cut in the header": (packed({"delta": good})[:20], "cut off"),
        "more behind": (packed({"delta": good}) + b"\0" * 8, "follow"),
        "header without end": ((2**63).to_bytes(8, "little") + b"{" * 100, "header"),
        "header too long": ((2**20 + 1).to_bytes(8, "little") + b" " * (2**20 + 1), "header"),
        "deep header": (header_of(b"[" * 200_000), "header"),
        "deep objects": (header_of(b'{"a":' * 100_000), "header"),
        "digits": (header_of(b'{"a":' + b"9" * 100_000 + b"}"), "header"),
        "list": (header_of([]), "object"),
        "named twice": (header_of(b'{"delta":1,"delta":2}'), "twice"),
        "huge shape": (header_of({"delta": entry(shape=(2**47, 2**47, 2**47))}), "shape"),
        "hidden shape": (header_of({"delta": entry(shape=(0, 2**47, 2**47))}), "shape"),
        "negative shape": (header_of({"delta": entry(shape=(-1, -size))}), "shape"),
        "many sides": (header_of({"delta": entry(shape=(1,) * 9)}), "shape"),
        "offsets": (header_of({"delta": entry(offsets=(4, 4 * size + 4))}), "lie"),
        "negative offsets": (header_of({"delta": entry(offsets=(-4, 0))}), "lie"),
        "objects": (header_of({"delta": entry(dtype="O")}), "dtype"),
        "metadata": (header_of({"__metadata__": {"weight": 1}}), "metadata"),
        "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "message"),
    }  # fmt: skip


def test_an_update_that_is_none_is_refused_at_the_door(arena, mallory, victim):
    """Each costs mallory its place in the attempt, and nothing else."""
    # Through the wire the ones that differ; that all are refused, the door itself shows.
    cases = bad_updates(arena.plan)
    sent = ("nan", "doubles", "longer", "garbage", "cut off", "header without end", "deep header",
            "huge shape", "newline as name", "many metrics")  # fmt: skip
    last = ""
    for name in sent:
        data, word = cases[name]
        order = mallory.assignment(last)
        last = order["assignment"]
        before = arena.refusals().get("malformed", 0)
        answer = mallory.upload(last, data)
        assert answer.status == 422, name
        verdict = json.loads(answer.data)
        assert verdict["verdict"] == "malformed"
        assert word in verdict["reason"], name
        assert arena.refusals()["malformed"] == before + 1
        (line,) = [
            each for each in arena.audit()
            if each["event"] == "update malformed" and each["assignment"] == last
        ]  # fmt: skip
        assert line["actor"] == "mallory" and word in line["reason"]
        # It cannot be tried again.
        assert mallory.upload(last, packed(delta(arena.plan))).status == 410, name
    assert mallory.assignment(last)["round"] == victim.assignment()["round"]


def test_the_door_refuses_every_update_that_is_none(arena):
    for name, (data, word) in bad_updates(arena.plan).items():
        with pytest.raises(UpdateRefused) as refusal:
            validate(unpack(data), arena.plan.schema)
        assert word in str(refusal.value), name
    validate(unpack(packed(delta(arena.plan))), arena.plan.schema)


# Names and paths.


TRICKS = [
    "..", "../..", "../../../../etc/passwd", "%2e%2e", "%2e%2e%2f%2e%2e%2fatoll.db", "..%2fca.pem",
    "..%5c..%5cca.pem", "%00", "a%00b", "ca-key.pem%00", "%ff%fe", "%c0%ae%c0%ae", "~", "*", "'",
    "%22", "%27%20OR%201=1--", "%0d%0aX:%20y", "%0a", "%3f", "%23", "%25", "CON", "a" * 5000,
    "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "%0a", "0" * 64,
]  # fmt: skip


@pytest.mark.parametrize("name", TRICKS, ids=[trick[:24] for trick in TRICKS])
def test_no_name_leads_out_of_its_place(arena, mallory, admin, name):
    for who, method, path, right in (
        (mallory, "GET", f"/v1/blobs/{name}", {404}),
        (mallory, "HEAD", f"/v1/uploads/{name}", {404, 410}),
        (mallory, "PATCH", f"/v1/uploads/{name}", {404, 410}),
        (mallory, "POST", f"/v1/assignments/{name}/fail", {404, 410}),
        (admin, "POST", f"/v1/sites/{name}/revoke", {404}),
    ):
        body = b'{"reason":"x"}' if path.endswith("fail") else b""
        sealed = who.headers(method, sealed_target(path), "0:0" if method == "PATCH" else body)
        about = {"Upload-Offset": "0", "Content-Length": "0"} if method == "PATCH" else {}
        text = arena.raw(
            request_bytes(method, path, {**sealed, **about, "Connection": "close"}, body)
        )
        assert status_of(text) in right, (path, text[:300])
        assert b"PRIVATE" not in text
        if method not in ("HEAD",):
            assert json.loads(text.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/b", "", " a", "a ", "é", "a\0", "a\n", "-a", "a" * 65, "."]
)
def test_no_site_is_invited_by_a_bad_name(arena, name, capsys):
    assert main(["invite", str(arena.state), "--", name]) == 1
    assert "cannot be a site's name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/admin", "/v2/status", "//v1/ca", "/health/", "/v1/stop/",
             "/v1/ca/", "/.git/config", "/v1/../v1/ca", "/metrics/x", "/docs", "/v1/uploads/"],
)  # fmt: skip
def test_unknown_paths(arena, path):
    text = arena.raw(request_bytes("GET", path, {"Connection": "close"}))
    assert status_of(text) == 404
    assert json.loads(text.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/health"), ("DELETE", "/v1/ca"), ("GET", "/v1/enrol"), ("PUT", "/v1/uploads"),
     ("GET", "/v1/uploads/x"), ("DELETE", "/v1/uploads/x"), ("GET", "/v1/stop"),
     ("TRACE", "/health"), ("OPTIONS", "/v1/stop"), ("POST", "/v1/status"), ("PROPFIND", "/v1/ca")],
)  # fmt: skip
def test_unknown_methods(arena, method, path):
    text = arena.raw(request_bytes(method, path, {"Connection": "close"}))
    assert status_of(text) == 405
    assert json.loads(text.partition(b"\r\n\r\n")[2])["error"]
    assert b"\r\nallow:" in text.lower()


def test_measures_ask_for_their_token(arena):
    token = (arena.state / "metrics.token").read_text()
    for given_ in ("", "Bearer ", "Bearer x", "Bearer " + token[:-1], "Basic " + token, "é" * 40):
        with answering(arena, 401):
            answer = arena.ask("GET", "/metrics", headers={"Authorization": given_})
        assert answer.status == 401
        assert token not in error_of(answer)
    assert arena.ask("GET", "/metrics").status == 401


@pytest.mark.parametrize(
    ("range_", "status"),
    [
        ("bytes=0-9", 206), ("bytes=5-", 206), ("bytes=0-99999999999999", 206),
        ("bytes=0-0,5-9", 200), ("bytes=" + ",".join(["0-"] * 1000), 200), ("bytes=-5", 200),
        ("bytes=--5", 200), ("lines=0-9", 200), ("bytes=a-b", 200), ("bytes=0x0-0x9", 200),
        ("bytes=" + "9" * 5000 + "-", 200), ("bytes=99999999-", 416), ("bytes=9-2", 416),
        ("bytes=\u00b2-", 200),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_ranges_are_one_or_none(arena, mallory, victim, range_, status):
    order = mallory.assignment()
    path, size = f"/v1/blobs/{order['model']}", order["size"]
    answer = mallory.ask("GET", path, headers={"Range": range_})
    assert answer.status == status
    if status == 200:
        assert len(answer.data) == size
        assert sha256(answer.data).hexdigest() == order["model"]
    elif status == 206:
        first, last = re.match(r"bytes (\d+)-(\d+)/", answer.headers["Content-Range"]).groups()
        assert len(answer.data) == int(last) - int(first) + 1 <= size
    else:
        assert answer.headers["Content-Range"] == f"bytes */{size}"
        assert error_of(answer)


# Below HTTP, and HTTP itself.


def test_older_tls_is_refused(arena):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", arena.port), timeout=10) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    with (
        socket.create_connection(("127.0.0.1", arena.port), timeout=10) as plain,
        context.wrap_socket(plain) as link,
    ):
        assert link.version() == "TLSv1.3"


def test_a_site_trusts_its_own_authority_only(arena, tmp_path):
    make_authority(tmp_path, "arena")
    foreign = (tmp_path / "ca.pem").read_bytes()
    with (
        socket.create_connection(("127.0.0.1", arena.port), timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        client_context(foreign).wrap_socket(plain, server_hostname="127.0.0.1")
    link = Connection(arena.url, foreign, Ed25519PrivateKey.generate(), "mallory")
    with pytest.raises(IdentityError, match="not the project's server"):
        link.ask("GET", "/v1/status")
    link.close()
    with pytest.raises(IdentityError, match="another authority"):
        find_authority(arena.url, Token.fresh("00" * 32))


def test_a_name_that_the_certificate_does_not_bear(arena):
    authority = (arena.state / "ca.pem").read_bytes()
    url = f"https://localhost:{arena.port}"
    link = Connection(url, authority, Ed25519PrivateKey.generate(), "mallory")
    with pytest.raises(IdentityError, match="not the project's server"):
        link.ask("GET", "/v1/status")
    link.close()


def test_join_refuses_a_server_of_another_authority(real, arena, capsys):
    other = real.root / "other"
    StateFolder.make(other, "other", ["127.0.0.1"])
    token = StateFolder.open(other).invite("lost", "site", 1.0)
    real.join("lost", str(token), client="3")
    assert real.wait("lost", 30) == 4
    log = real.log("lost")
    assert "has another authority" in log and "Traceback" not in log
    assert not (real.root / "lost" / "ca.pem").exists()


@pytest.mark.parametrize("claimed", [None, 1 << 26, 1 << 50], ids=["none", "much", "absurd"])
def test_a_stranger_in_between_cannot_fill_a_sites_memory(tmp_path, claimed):
    """The first contact is with whoever answers: no more is read than a certificate has."""
    make_authority(tmp_path, "x")
    make_server(tmp_path, ["127.0.0.1"])
    context, sent = server_context(tmp_path), [0]
    listener = socket.create_server(("127.0.0.1", 0))

    def pour():
        with listener, suppress(OSError), context.wrap_socket(listener.accept()[0], True) as link:
            link.recv(65536)
            length = "" if claimed is None else f"Content-Length: {claimed}\r\n"
            link.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
            while sent[0] < 64 << 20:
                link.sendall(b"x" * 65536)
                sent[0] += 65536

    pouring = threading.Thread(target=pour)
    pouring.start()
    with pytest.raises((IdentityError, urllib3.exceptions.HTTPError, ConfigurationError)):
        find_authority(f"https://127.0.0.1:{listener.getsockname()[1]}", Token.fresh("00" * 32))
    pouring.join(20)
    assert sent[0] < 8 << 20


def test_plaintext_on_the_tls_port(arena):
    with socket.create_connection(("127.0.0.1", arena.port), timeout=10) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in drain(link)
    with socket.create_connection(("127.0.0.1", arena.port), timeout=10) as link:
        link.sendall(random.Random(0).randbytes(2000))
        drain(link)
    assert arena.ask("GET", "/health").status == 200


SMUGGLED = b"GET /v1/ca HTTP/1.1\r\nHost: x\r\n\r\n"
SMUGGLING = {
    "both": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 34\r\n\r\n",
    "list of lengths": b"Content-Length: 0, 34\r\n\r\n",
    "signed length": b"Content-Length: +0\r\n\r\n",
    "negative length": b"Content-Length: -1\r\n\r\n",
    "hidden chunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "space before colon": b"Content-Length : 0\r\n\r\n",
    "chunk size": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "huge chunk": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n\r\n",
    "bare line feed": b"X: a\n\nContent-Length: 0\r\n\r\n",
    "NUL": b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("rest", SMUGGLING.values(), ids=SMUGGLING)
def test_no_request_hides_behind_another(arena, rest):
    with arena.connect() as link:
        link.settimeout(0.5)
        link.sendall(b"POST /v1/challenge HTTP/1.1\r\nHost: x\r\n" + rest + SMUGGLED)
        taken = b""
        try:
            while piece := link.recv(65536):
                taken += piece
        except (TimeoutError, ConnectionError, ssl.SSLError):
            pass
    assert status_of(taken) == 400, taken
    assert b"CERTIFICATE" not in taken
    assert taken.count(b"HTTP/1.1 ") == 1


def test_a_head_without_end_is_cut_off(arena):
    """Nobody fills the server's memory with headers."""
    for text in (b"X: " + b"a" * (8 << 20), b"X: y\r\n" * (1 << 20)):
        sent = 0
        with arena.connect() as link:
            link.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            try:
                for at in range(0, len(text), 65536):
                    link.sendall(text[at : at + 65536])
                    sent += 65536
                link.sendall(b"\r\n\r\n")
                answer = status_of(drain(link))
            except (ConnectionError, ssl.SSLError, TimeoutError):
                continue
        assert answer in (0, 400, 431), f"{sent} bytes of headers were taken: {answer}"


@pytest.mark.parametrize(
    "line",
    [
        "CONNECT localhost:1 HTTP/1.1", "GET http://other/v1/ca HTTP/1.1", "GET /v1/ca HTTP/3.9",
        "GET  /v1/ca HTTP/1.1", "\x16\x03\x01",
    ],
)  # fmt: skip
def test_odd_request_lines_do_not_break_the_server(arena, line):
    text = arena.raw(f"{line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1"))
    assert status_of(text) < 500
    assert arena.ask("GET", "/health").status == 200


@pytest.mark.parametrize("host", ["[", "[::1", "a:b:c", "a" * 5000, "x\u00e9", "", "a/b", "a@b"])
def test_odd_hosts_do_not_break_the_server(arena, mallory, victim, host):
    body = json.dumps(mallory.greeting()).encode()
    mallory.assignment()
    sealed = mallory.headers("POST", "/v1/checkin", body)
    lines = [
        "POST /v1/checkin HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}",
        "Connection: close", *(f"{name}: {value}" for name, value in sealed.items()),
    ]  # fmt: skip
    text = arena.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    assert status_of(text) in (200, 400, 401)


@pytest.mark.parametrize("query", ["wait=%ff", "wait=\xff", "%", "=&=&", "wait=0&wait=nan", "\x80"])
def test_odd_queries_do_not_break_the_server(arena, mallory, victim, query):
    body = json.dumps(mallory.greeting()).encode()
    mallory.assignment()
    sealed = mallory.headers("POST", f"/v1/checkin?{query}", body)
    text = arena.raw(
        request_bytes("POST", f"/v1/checkin?{query}", {**sealed, "Connection": "close"}, body)
    )
    assert status_of(text) in (200, 400, 401), text


def test_nobody_chooses_the_name_they_are_logged_under(arena):
    """Whoever was refused is logged by the address they came from, not by one they give."""
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-Ip"):
        with arena.refusing("enrolment", "127.0.0.1"):
            answer = arena.ask(
                "POST", "/v1/enrol",
                {"secret": "00" * 32, "key": "00" * 32, "signature": "00" * 64},
                {name: "victim"},
            )  # fmt: skip
        assert answer.status == 401


# What takes time, or would be fatal.


def begun(who, data, sent):
    """An offer, and a request for all its bytes that breaks off: order, target, offset, bytes."""
    order = who.assignment()
    offered = who.offer(order["assignment"], len(data), sha256(data).hexdigest())
    target, at = offered.headers["Location"], int(offered.headers["Upload-Offset"])
    about = {"Upload-Offset": str(at), "Content-Length": str(len(data) - at)}
    sealed = who.headers("PATCH", target, f"{at}:{len(data) - at}")
    request = request_bytes("PATCH", target, {**sealed, **about}, data[at : at + sent])
    return order, target, at, request


def test_a_slow_body_is_given_up(inner, pair, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_PATIENCE", 0.3)
    started = time.monotonic()
    with answering(inner, 408), inner.connect() as link:
        link.sendall(request_bytes("POST", "/v1/challenge", {"Content-Length": "100"}, b'{"site'))
        answer = drain(link)
    assert status_of(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    # What came of an upload is kept.
    eve = pair[0]
    data = packed(delta(inner.plan))
    _, target, _, request = begun(eve, data, 500)
    with inner.connect() as link:
        link.sendall(request)
        assert status_of(drain(link)) == 408
    assert eve.ask("HEAD", target).headers["Upload-Offset"] == "500"
    assert time.monotonic() - started < 5


def test_a_message_that_drips_is_given_up(inner, monkeypatch):
    """A short message has no reason to come in many small pieces for ever."""
    monkeypatch.setattr(bodies, "BODY_PATIENCE", 0.3)
    body = b'{"site": "nobody"}'
    with inner.connect() as link:
        link.sendall(request_bytes("POST", "/v1/challenge", {"Content-Length": str(len(body))}))
        try:
            for n in range(len(body)):
                link.sendall(body[n : n + 1])
                time.sleep(0.1)
        except ConnectionError:
            return
        assert status_of(drain(link)) in (0, 408)


def test_two_do_not_write_one_upload(inner, pair):
    eve, data = pair[0], packed(delta(inner.plan))
    _, target, at, request = begun(eve, data, 100)
    with inner.connect() as link:
        link.sendall(request)
        time.sleep(0.2)
        answer = eve.patch(target, at, data[at:])
        assert answer.status in (409, 423)
        assert error_of(answer)
    assert inner.failed is None


def test_an_offer_that_changes_while_it_is_being_sent(inner, pair):
    """The file that is being written goes away below the writer."""
    eve, data = pair[0], packed(delta(inner.plan, 0.5))
    order, _, _, request = begun(eve, data, 100)
    with inner.connect() as link:
        link.sendall(request)
        time.sleep(0.2)
        assert eve.offer(order["assignment"], 50, "00" * 32).status == 201
        link.sendall(data[100:])
        status = status_of(drain(link))
    assert status in (409, 410, 422)
    assert inner.failed is None


FATAL = {
    "surrogate": {"\ud800": np.zeros(1, np.float32)},
    "surrogate and good": {"delta\udfff": np.zeros(1, np.float32)},
    "NUL": {"delta\0": np.zeros(1, np.float32)},
    "escape": {"\x1b[2J\x1b]0;x\x07": np.zeros(1, np.float32)},
    "line": {"a\nround 3 closed with 8 updates": np.zeros(1, np.float32)},
    "long": {"a" * 500_000: np.zeros(1, np.float32)},
    "many": {f"{n}": np.zeros(0, np.float32) for n in range(9_000)},
}


@pytest.mark.parametrize("vectors", FATAL.values(), ids=FATAL)
def test_no_array_name_is_fatal(doomed, vectors):
    inner, eve = doomed
    order = eve.assignment()
    answer = eve.upload(order["assignment"], packed(vectors))
    assert inner.failed is None
    assert answer.status == 422
    assert json.loads(answer.data)["verdict"] == "malformed"
    (line,) = [
        each for each in inner.audit()
        if each["event"] == "update malformed" and each["assignment"] == order["assignment"]
    ]  # fmt: skip
    # The log is no place for a megabyte of somebody's words.
    assert len(line["reason"]) < 5000
    assert line["reason"].isprintable()


REASONS = {"NUL": "\0", "escape": "\x1b[2J", "line": "a\nb", "long": "x" * 1000,
           "last": "\U0010ffff", "nothing": ""}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
def test_no_reason_is_fatal(doomed, reason):
    inner, eve = doomed
    order = eve.assignment()
    path = f"/v1/assignments/{order['assignment']}/fail"
    if any(ord(c) < 32 for c in reason):
        assert eve.ask("POST", path, {"reason": reason}).status == 400
        reason = "none"
    assert eve.ask("POST", path, {"reason": reason}).status == 204
    assert eve.ask("POST", path, {"reason": reason}).status == 410
    assert inner.failed is None


METRICS = {"surrogate": "\ud800", "line": "a\nround 9 closed", "escape": "\x1b[2Jloss", "NUL": "\0",
           "long": "x" * 10_000}  # fmt: skip


@pytest.mark.parametrize("name", METRICS.values(), ids=METRICS)
def test_no_metric_name_breaks_what_others_see(tmp_path, arena, name, capsys, caplog):
    """Refused at the door or shown as what it is: never a 500, nor a word to a terminal."""
    about = {f"metric/{name}": "0.5", "weight": "1.0"}
    data = b"".join(bytes(piece) for piece in safetensors.encode(flat(arena.plan), about))
    with closing(Inner(tmp_path, arena.plan)) as inner, caplog.at_level("INFO", "atoll.service"):
        pair = inner.insider("eve").open(), inner.insider("bob").open()
        statuses = {who.upload(who.assignment()["assignment"], data).status for who in pair}
        assert statuses <= {200, 410, 422}
        end = time.monotonic() + 5
        while statuses == {200} and inner.loop.version["version"] == 0:
            assert time.monotonic() < end and inner.failed is None
            time.sleep(0.05)
        assert inner.failed is None
        answer = inner.insider("ana", "analyst").ask("GET", "/v1/rounds")
        assert answer.status == 200
        assert len(answer.data) < 8000
        assert main(["rounds", str(inner.state)]) == 0
        shown = capsys.readouterr().out
        assert all(line.isprintable() for line in shown.splitlines())
        assert not any(line.startswith("round 9") for line in shown.splitlines())
        assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reason", "array", "metric", "path"])
def test_nul_is_not_fatal_on_postgresql(tmp_path, arena, what):
    """It takes no NUL in a text, which SQLite does."""
    with (
        postgresql(tmp_path) as url,
        closing(Inner(tmp_path / "inner", arena.plan, database=url)) as inner,
    ):
        eve, bob = inner.insider("eve").open(), inner.insider("bob").open()
        order = eve.assignment()
        if what == "reason":
            path = f"/v1/assignments/{order['assignment']}/fail"
            assert eve.ask("POST", path, {"reason": "a\0b"}).status in (204, 400)
        elif what == "array":
            data = packed({"delta\0": np.zeros(1, np.float32)})
            assert eve.upload(order["assignment"], data).status == 422
        elif what == "metric":
            about = {"metric/a\0b": "0.5", "weight": "1.0"}
            data = b"".join(bytes(piece) for piece in safetensors.encode(flat(inner.plan), about))
            assert eve.upload(order["assignment"], data).status in (200, 422)
        else:
            sealed = eve.headers("HEAD", sealed_target("/v1/uploads/a%00b"))
            text = inner.raw(
                request_bytes("HEAD", "/v1/uploads/a%00b", {**sealed, "Connection": "close"})
            )
            assert status_of(text) in (404, 410)
        assert inner.failed is None
        assert bob.order()["kind"] in ("train", "wait")


def test_a_flood_of_challenges_drives_out_nobody(inner, pair):
    """Anyone may ask for challenges; a site that is about to answer one is not the worse for it."""
    eve = pair[0]
    nonce = json.loads(inner.ask("POST", "/v1/challenge", {"site": "eve"}).data)["nonce"]
    for _ in range(300):
        assert inner.ask("POST", "/v1/challenge", {"site": "nobody"}).status == 200
    for n in range(5000):
        inner.app.sessions.challenge(f"s{n}")
    assert eve.answer(nonce=nonce).status == 200
    assert eve.answer(nonce=nonce).status == 401


def test_a_flood_of_refusals_is_counted_and_only_sampled_in_the_log(inner, pair):
    eve = pair[0]
    before, length = inner.refusals().get("seal", 0), len(inner.audit())
    sealed = eve.headers("GET", "/v1/status")
    for _ in range(200):
        assert inner.ask("GET", "/v1/status", headers={**sealed, "Atoll-Seal": "x"}).status == 401
    assert inner.refusals()["seal"] == before + 200
    assert len(inner.audit()) - length < 150


# Fuzzing.


def fuzz(inner, examples, mode):
    """Requests of the served description's making, sealed, some of them about real things."""
    served = json.loads(inner.ask("GET", "/v1/openapi.json").data)
    # Schemathesis makes an invalid schema of a tuple's prefixItems.
    wait = served["components"]["schemas"]["Order"]["properties"]["wait"]
    wait["items"] = wait.pop("prefixItems")[0]
    schema = schemathesis.openapi.from_dict(served)
    insiders = [
        inner.insider(f"fuzz-{role}-{mode.value}", role).open() for role in ("analyst", "admin")
    ] + [inner.insider(f"fuzz-{n}-{mode.value}").open() for n in range(2)]
    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    seen, faults = set(), {}

    @given(
        who=st.sampled_from(insiders),
        real=st.booleans(),
        sealed=st.integers(0, 9),
        case=schema.as_strategy(mode),
    )
    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def run(who, real, sealed, case):
        if real:
            meaningful(inner, who, case)
        more = {"auth": SealAuth(lambda: who)} if sealed else {}
        response = case.call(base_url=inner.url, timeout=10, **more)
        seen.add((case.method, case.path, response.status_code))
        assert inner.failed is None
        try:
            case.validate_response(response, checks=checks)
        except Exception as error:
            faults.setdefault((case.method, case.path, response.status_code), str(error)[:300])

    run()
    assert not faults
    return seen


def meaningful(inner, who, case):
    """Make a case be about what exists, so that it passes the first door."""
    if isinstance(case.body, dict):
        if case.path == "/v1/checkin":
            case.body.update(who.greeting())
        elif case.path in ("/v1/challenge", "/v1/session"):
            case.body["site"] = who.name
        row = inner.loop.open.get(who.name)
        if case.path == "/v1/uploads" and row:
            case.body["assignment"] = row["id"]
    if case.path == "/v1/checkin":
        case.query = {"wait": "0"}
    if "digest" in (case.path_parameters or {}):
        case.path_parameters["digest"] = inner.loop.version["broadcast"]
    row = inner.loop.open.get(who.name)
    if "upload" in (case.path_parameters or {}) and row:
        offered = who.offer(row["id"], 1000, "00" * 32)
        if offered.status == 201:
            case.path_parameters["upload"] = offered.headers["Location"].rpartition("/")[2]
            case.headers["Upload-Offset"] = offered.headers["Upload-Offset"]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=str)
def test_requests_of_the_descriptions_making_a_few(tmp_path, arena, mode):
    with closing(Inner(tmp_path, arena.plan)) as inner:
        seen = fuzz(inner, 60, mode)
    assert len({path for _, path, _ in seen}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=str)
def test_requests_of_the_descriptions_making(tmp_path, arena, mode):
    with closing(Inner(tmp_path, arena.plan)) as inner:
        seen = fuzz(inner, 600, mode)
    assert len({path for _, path, _ in seen}) >= 12


KINDS = sorted(messages.Message.__subclasses__(), key=lambda kind: kind.__name__)
GOOD = [
    messages.Enrol("00" * 32, "11" * 32, "22" * 64),
    messages.Challenge("a", "00" * 32),
    messages.CheckIn("00" * 32, "11" * 32, 3, "1.0.2", False, {"atoll": "1"}),
    messages.Offer("1.0.2", 1234, "00" * 32),
    messages.Failure("because"),
    messages.Order("train", "1.0.2", 1, 3, 1, 1.0, 7, "00" * 32, 10),
]


def mutated(data, good):
    """Good bytes with some of them changed, cut out, repeated or put in."""
    body = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        how = data.draw(st.integers(0, 3))
        if how == 0 and body:
            body[at] = data.draw(st.integers(0, 255))
        elif how == 1:
            del body[at : at + data.draw(st.integers(1, 40))]
        elif how == 2:
            body[at:at] = data.draw(st.binary(max_size=20))
        else:
            body[at:at] = body[at : at + data.draw(st.integers(1, 40))]
    return bytes(body)


@given(st.data())
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_a_message_error(data):
    kind = data.draw(st.sampled_from(KINDS))
    good = messages.write(data.draw(st.sampled_from(GOOD)))
    body = data.draw(st.binary(max_size=200)) if data.draw(st.booleans()) else mutated(data, good)
    try:
        found = messages.read(kind, body)
    except messages.MessageError:
        return
    assert messages.read(kind, messages.write(found)) == found


SCHEMA = Schema.of({"delta": 5}, metrics={"train_loss": (0.0, 9.0)})
SMALL = packed({"delta": np.arange(5, dtype=np.float32)}, 2.0, train_loss=0.5)


@given(st.data())
@settings(max_examples=300)
def test_any_bytes_are_an_update_or_are_refused(data):
    if data.draw(st.booleans()):
        body = mutated(data, SMALL)
    else:
        text = json.dumps(
            data.draw(
                st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inside: (
                        st.lists(inside, max_size=4)
                        | st.dictionaries(
                            st.sampled_from(
                                [
                                    "vectors/delta",
                                    "__metadata__",
                                    "dtype",
                                    "shape",
                                    "data_offsets",
                                    "weight",
                                ]
                            ),
                            inside | st.sampled_from(["F32", "I64", [5], [0, 20], "1.0"]),
                            max_size=4,
                        )
                    ),
                )
            )
        ).encode()
        body = len(text).to_bytes(8, "little") + text + data.draw(st.binary(max_size=40))
    with suppress(UpdateRefused):
        validate(unpack(body), SCHEMA)


# The log, and the end.


def test_a_log_that_was_tampered_with_says_where(real, arena, mallory, victim, capsys):
    state = str(arena.state)
    copy, archive = str(real.root / "copy"), str(real.root / "copy.tar")
    assert main(["backup", state, archive]) == 0
    assert main(["restore", archive, copy]) == 0
    capsys.readouterr()
    assert main(["audit", "verify", copy]) == 0
    last = re.search(r"[0-9a-f]{64}", capsys.readouterr().out)[0]

    def tampered(statement):
        with closing(sqlite3.connect(real.root / "copy" / "atoll.db")) as base:
            base.execute(statement)
            base.commit()
        code = main(["audit", "verify", copy, "--expect", last])
        return code, capsys.readouterr().out

    with closing(sqlite3.connect(real.root / "copy" / "atoll.db")) as base:
        (count,) = base.execute("SELECT max(number) FROM audit").fetchone()
    code, said = tampered(f"DELETE FROM audit WHERE number = {count}")
    assert code == 1 and "cut off" in said
    code, said = tampered("UPDATE audit SET number = 100000 WHERE number = 9")
    assert code == 1 and "line 9 is missing" in said
    code, said = tampered("UPDATE audit SET time = time + 1 WHERE number = 7")
    assert code == 1 and "line 7 was changed" in said
    code, said = tampered("UPDATE audit SET actor = 'nobody' WHERE number = 5")
    assert code == 1 and "line 5 was changed" in said
    code, said = tampered("UPDATE audit SET detail = '{}' WHERE number = 3")
    assert code == 1 and "line 3 was changed" in said and "2 lines before it" in said
    assert main(["audit", "verify", state]) == 0


def test_a_site_revoked_at_the_folder_is_not_waited_for(real, arena, mallory, victim):
    """`atoll revoke STATE` beside the server: a round does not hang on whoever is gone."""
    mallory.assignment()
    victim.assignment()
    real.cli("revoke", "state", "mallory")
    with arena.refusing("revoked", "mallory"):
        assert mallory.ask("POST", "/v1/checkin", mallory.greeting()).status == 403
    with arena.refusing("session"):
        assert mallory.answer().status == 403
    real.until(
        lambda: re.search(r"^atoll_sites_at_work 0", arena.metrics(), re.M), 10,
        "the round's end without mallory",
    )  # fmt: skip


def test_and_the_federation_goes_on(real, arena, admin, victim, mallory):
    """After all of it two honest sites finish the rounds."""
    for name in ("mallory", "victim"):
        assert admin.ask("POST", f"/v1/sites/{name}/revoke").status == 204
    for name in ("a", "b"):
        real.join(name, str(arena.invite(name)), client="1" if name == "a" else "2")
    for name in ("a", "b"):
        assert real.wait(name, 60) == 0, real.log(name)
    arena.close()
    assert real.wait("server", 30) == 0, real.log("server")[-3000:]
    rows = [json.loads(line) for line in real.cli("rounds", "state", "--json").splitlines()]
    closed = [row for row in rows if row["state"] == "closed"]
    assert [row["round"] for row in closed] == [1, 2, 3]
    for record in (row["record"] for row in closed):
        assert [p[0] for p in record["participants"] if p[1] == "accepted"] == ["a", "b"]
        assert record["accepted"] == 2
    models = [(real.root / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert models[0] == models[1]
    model = load_model(real.root / "a" / "model.safetensors")
    assert np.isfinite(model.vectors["params"]).all()
    assert "holds" in real.cli("audit", "verify", "state")
    shown = real.cli("audit", "show", "state")
    told = arena.audit()
    assert len(shown.splitlines()) == len(told)
    # Whoever was refused is in what an operator sees.
    for each in told:
        if each["event"] == "refused":
            assert f"{each['actor']}: refused" in shown and f'"what":"{each["what"]}"' in shown


def test_no_attack_made_the_server_stumble(real):
    assert "Traceback" not in real.log("server")


def test_nobody_writes_lines_of_their_own_into_the_servers_log(real):
    for line in real.log("server").split("\n"):
        assert re.match(r"(\d\d:\d\d:\d\d [A-Z]+ |$)", line) and line.isprintable(), line
