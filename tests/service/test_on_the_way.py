"""What lies between a site and its server: paths, proxies, gateways, and an absent server."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")
import urllib3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from front import Front

from atoll.cli import main
from atoll.errors import ConfigurationError
from atoll.site import connection
from atoll.site.connection import Connection, Refusal, Unreachable, address

SLOW = """
import time
from dataclasses import dataclass

@dataclass(frozen=True, eq=False)
class Slow(atoll.learners.NumpyLearner):
    def train(self, *given, **named):
        time.sleep({seconds})
        return super().train(*given, **named)
"""


def slowly(place, seconds, **settings):
    """A federation whose sites take so long to train."""
    place.write(**settings)
    path = place.root / "federation.py"
    text = path.read_text().replace("atoll.learners.NumpyLearner(", "Slow(")
    head, rest = text.split("federation = ", 1)
    path.write_text(f"{head}{SLOW.format(seconds=seconds)}\nfederation = {rest}")


@pytest.fixture
def fronts():
    made = []
    yield lambda *given, **named: made.append(Front(*given, **named)) or made[-1]
    for each in made:
        each.close()


GOOD = {
    "https://a": "https://a",
    "https://a.example:8443/": "https://a.example:8443",
    " https://a:1/fl/ ": "https://a:1/fl",
    "https://[::1]:8443/x/y": "https://[::1]:8443/x/y",
    "https://10.0.0.1": "https://10.0.0.1",
}
BAD = [
    "", "a", "a:8443", "http://a", "https://", "https:///x", "https://a:70000", "https://a:x",
    "https://a:0", "https://u:p@a", "https://a?b", "https://a#b", "https://a b", "https://[::1",
    "ftp://a", "https://https://a", "https://-a",
]  # fmt: skip


@pytest.mark.parametrize("url", GOOD)
def test_addresses_keep_their_path(url):
    assert address(url) == GOOD[url]


@pytest.mark.parametrize("url", BAD)
def test_addresses_that_can_never_be_are_refused_at_once(url):
    with pytest.raises(ConfigurationError, match="server's address"):
        address(url)


@pytest.mark.parametrize(
    ("proxy", "spared", "through"),
    [
        ("http://proxy:3128", "", True),
        ("http://proxy:3128", "a", False),
        ("http://proxy:3128", "localhost,.example", True),
        ("", "", False),
    ],
)
def test_a_proxy_of_the_environment_is_used(monkeypatch, proxy, spared, through):
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", spared)
    link = Connection("https://a:8443", None, Ed25519PrivateKey.generate())
    assert isinstance(link._pool, urllib3.ProxyManager) == through


def test_a_proxy_that_cannot_be_is_said(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "ftp://proxy")
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY"):
        Connection("https://a:8443", None, Ed25519PrivateKey.generate())


def test_patience_ends_in_a_sentence():
    told, slept = [], []
    link = Connection(
        "https://127.0.0.1:9", None, Ed25519PrivateKey.generate(), "a", slept.append, told.append,
        patience=0.0,
    )  # fmt: skip
    with pytest.raises(Unreachable, match="not reached.*gave up after 0 s"):
        link.ask("GET", "/v1/status")
    assert slept == told == []


@pytest.mark.parametrize("command", ["status", "rounds", "sites", "page", "stop"])
def test_commands_end_when_the_server_is_down(place, command, monkeypatch, capsys):
    from atoll.cli import access

    monkeypatch.setattr(access, "PATIENCE", 0.3)
    folder = place.root / "ann"
    folder.mkdir()
    about = {"url": "https://127.0.0.1:9", "site": "ann", "project": "p"}
    (folder / "site.json").write_text(json.dumps(about))
    assert main([command, str(folder)]) == 5
    assert "was not reached" in capsys.readouterr().err


def test_enrolment_ends_when_the_server_is_down(place, capsys):
    token = place.invite("ann", "--role", "analyst")
    folder = str(place.root / "ann")
    assert main(["enrol", "https://127.0.0.1:9", "--token", token, "--folder", folder]) == 5
    assert "was not reached" in capsys.readouterr().err


def test_a_site_waits_for_a_server_behind_a_gateway(place, fronts):
    place.write(schedule="Synchronous(rounds=2)")
    token = place.invite("0")
    front = fronts(place.port, place.state)
    place.join("0", token, url=front.url)
    place.until(lambda: len(front.seen) > 1, what="the first attempts")
    assert place.processes["0"].poll() is None, place.log("0")
    place.serve("--linger", "10")
    assert place.wait("0") == 0, place.log("0")


@pytest.mark.slow
def test_heartbeats_and_restarts_keep_the_path(place, fronts):
    slowly(place, 4, schedule="Synchronous(rounds=2, pause=0.1)")
    token = place.invite("0")
    front = fronts(place.port, place.state, prefix="/fl/one")
    place.serve("--linger", "10", "--lease", "2")
    place.join("0", token, url=front.url)
    place.until(lambda: "round 1 of 2: trained" in place.log("0"), what="the first round")
    place.kill("0")
    # Without an address: what it has kept is enough.
    place.start("0", "join", "", "federation.py", "--data", "0.py", "--folder", "0")
    assert place.wait("0") == 0, place.log("0")
    rounds = [json.loads(line) for line in place.cli("rounds", "state", "--json").splitlines()]
    assert all("not heard of" not in row["reason"] for row in rounds), rounds
    assert not [target for _, target, status in front.seen if status == 404]


@pytest.mark.slow
@pytest.mark.parametrize("status", [404, 413])
def test_what_a_proxy_refuses_for_good_is_told_and_given_up(place, fronts, status):
    """An update that does not get through: one try a round, a pause, an end, and all is said."""
    place.write(schedule="Synchronous(rounds=2, minimum=1, pause=0.1, attempts=1000)")
    token = place.invite("0")

    def says(method, target, size):
        return status if "/uploads" in target else None

    front = fronts(place.port, place.state, says=says)
    place.serve("--linger", "10")
    place.join("0", token, url=front.url)
    assert place.wait("0", 120) == 1, place.log("0")
    assert f"refused on the way with status {status}" in place.log("0")
    assert place.log("0").count(": trained in") == 5
    place.until(lambda: "has left" in place.log("server"), what="the farewell")
    assert "0 does not deliver for round 1: its update of" in place.log("server")
    assert f"status {status}" in place.log("server")


def test_an_identity_learns_where_the_server_is_now(place, monkeypatch, capsys):
    from atoll.cli import access

    monkeypatch.setattr(access, "PATIENCE", 0.3)
    folder = place.root / "ann"
    token = place.invite("ann", "--role", "analyst")
    place.serve("--linger", "1")
    place.until(lambda: "leading" in place.log("server"), what="the server's start")
    place.cli("enrol", place.url, "--token", token, "--folder", "ann")
    about = json.loads((folder / "site.json").read_text())
    (folder / "site.json").write_text(json.dumps({**about, "url": "https://127.0.0.1:9"}))
    assert main(["status", str(folder)]) == 5
    assert main(["status", str(folder), "--url", place.url + "/"]) == 0
    assert main(["status", str(folder)]) == 0
    assert json.loads((folder / "site.json").read_text())["url"] == place.url
    assert main(["status", str(place.state), "--url", place.url]) == 1
    assert "no identity's folder" in capsys.readouterr().err


@pytest.mark.parametrize("status", [403, 404, 410, 413, 422])
def test_what_is_in_between_is_asked_again_and_the_server_is_believed(status):
    """A page of HTML is a proxy's, which may be set up anew; a `Problem` is settled."""
    link = Connection("https://a:8443", None, Ed25519PrivateKey.generate(), sleep=lambda _: None)
    for body, ours in ((b"<html>no</html>", False), (b'{"error":"no"}', True)):
        tries = []

        def attempt(body=body, tries=tries):
            tries.append(body)
            raise connection._refusal(status, body)

        with pytest.raises(Refusal) as told:
            link._persist(attempt)
        assert told.value.status == status and told.value.ours is ours
        assert len(tries) == (1 if ours else 1 + connection.ELSEWHERE)
