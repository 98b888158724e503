"""The server's certificate is renewed while it serves, and its end is not the end of anybody."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import threading
import time
from datetime import datetime, timedelta

import pytest

pytest.importorskip("sklearn")
from conftest import free_port
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.algorithms import FedAvg
from atoll.cli import main
from atoll.cli.files import read_plan
from atoll.data import load
from atoll.errors import ConfigurationError
from atoll.federation import Federation
from atoll.learners import NumpyLearner
from atoll.protocol import certificates, messages
from atoll.protocol.certificates import client_context, hosts_of, make_server, renew_server
from atoll.protocol.identity import IdentityError
from atoll.rounds.schedules import Synchronous
from atoll.service.serve import Listening, serve
from atoll.service.settings import Service
from atoll.service.storage.folder import StateFolder
from atoll.site import agent
from atoll.site.connection import Connection


@pytest.fixture
def folder(tmp_path):
    return StateFolder.make(tmp_path / "state", "p", ["127.0.0.1", "fl.example"])


def serial(folder):
    return x509.load_pem_x509_certificate((folder.path / "server.pem").read_bytes()).serial_number


def ending(folder, monkeypatch, days):
    """A certificate with so many days left."""
    begun = days - 400

    class Then(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(days=begun)

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "datetime", Then)
        patched.setattr(certificates, "SERVER_DAYS", 400)
        make_server(folder.path, hosts_of(folder.path))


def test_it_is_renewed_a_month_before_its_end_and_not_sooner(folder, monkeypatch):
    for days, renewed in [(40, False), (29, True), (-1, True)]:
        ending(folder, monkeypatch, days)
        before = serial(folder)
        assert renew_server(folder.path) == renewed == (serial(folder) != before)
    assert hosts_of(folder.path) == ["127.0.0.1", "fl.example"]


def test_without_the_authoritys_key_a_server_starts_until_the_end(folder, monkeypatch, caplog):
    ending(folder, monkeypatch, 10)
    (folder.path / "ca-key.pem").rename(folder.path / "kept-elsewhere")
    before = serial(folder)
    with caplog.at_level(logging.WARNING, "atoll.service"):
        assert not renew_server(folder.path)
    assert "ca-key.pem is not there" in caplog.text and serial(folder) == before
    (folder.path / "kept-elsewhere").rename(folder.path / "ca-key.pem")
    ending(folder, monkeypatch, -1)
    (folder.path / "ca-key.pem").unlink()
    with pytest.raises(ConfigurationError, match="put it back"):
        renew_server(folder.path)


def test_a_server_takes_up_a_new_certificate_while_it_serves(place):
    folder, port, stop = StateFolder.open(place.state), free_port(), threading.Event()
    plan = read_plan(str(place.root / "federation.py"))
    listening = Listening(host="127.0.0.1", port=port, linger=0.0, certificate=0.1)
    server = threading.Thread(
        target=serve, args=(plan, folder, Service(), listening), kwargs={"stop": stop}
    )
    server.start()

    def served():
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            client_context(folder.authority).wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            found = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True))
            return found.serial_number

    def until(wanted):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if served() == wanted:
                    return
            except (OSError, ssl.SSLError):
                pass
            time.sleep(0.1)
        raise AssertionError("the certificate is another")

    try:
        first = serial(folder)
        until(first)
        make_server(folder.path, ["127.0.0.1", "other.example"])
        assert serial(folder) != first
        until(serial(folder))
    finally:
        stop.set()
        server.join(20)


@pytest.mark.parametrize(
    ("code", "told"), [(10, "has ended; it is 20"), (9, "is not valid yet; it is 20.*is it behind")]
)
def test_a_site_waits_for_a_certificate_that_is_in_time(code, told):
    slept, notes = [], []
    link = Connection(
        "https://a", None, Ed25519PrivateKey.generate(), "a", slept.append, notes.append
    )
    left = [2]

    def attempt():
        if left[0]:
            left[0] -= 1
            error = ssl.SSLCertVerificationError("certificate verify failed")
            error.verify_code = code
            raise OSError("connection") from error
        return "there"

    assert link._persist(attempt) == "there"
    assert len(slept) == 2
    assert re.search(told, notes[0])


def test_another_authority_is_no_matter_of_time():
    link = Connection("https://a", None, Ed25519PrivateKey.generate())

    def attempt():
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_code = 20
        raise OSError("connection") from error

    with pytest.raises(IdentityError, match="not the project's server"):
        link._persist(attempt)


@pytest.mark.parametrize(
    "host", ["https://a", "a:8443", "", "a b", "-a", "a..b", "a/b", "ä b", "[::1]", "1.2.3.4:5"]
)
def test_hosts_that_are_none_are_refused_and_nothing_is_left(tmp_path, host, capsys):
    state = tmp_path / "state"
    assert main(["init", str(state), f"--host={host}"]) == 1
    assert "is no host" in capsys.readouterr().err
    assert not state.exists()
    assert main(["init", str(state), "--host", "a"]) == 0
    assert main(["hosts", str(state), "--", host]) == 1


def test_an_init_that_fails_can_be_tried_again(tmp_path):
    state = tmp_path / "state"
    words = ["init", str(state), "--host", "127.0.0.1"]
    assert main([*words, "--database", "nonsense://x"]) == 1
    assert main(words) == 0


def test_the_public_authorities_are_trusted_until_the_projects_is_again(tmp_path, monkeypatch):
    """`--public-ca` is undone by joining with the token once more, as only that says whom."""
    folder = StateFolder.make(tmp_path / "state", "p", ["localhost"])
    token = folder.invite("a", "site", 1.0)
    plan = Federation(
        learner=NumpyLearner(layers=(64, 10)), algorithm=FedAvg(), schedule=Synchronous(rounds=1)
    )
    data = load("digits").iid(clients=1)
    place = tmp_path / "a"
    pem = (folder.path / "ca.pem").read_bytes()
    monkeypatch.setattr(agent, "find_authority", lambda url, given: pem)
    monkeypatch.setattr(
        Connection, "enrol", lambda self, given: messages.Enrolled("a", "site", "p")
    )
    site = agent.Site(place, plan, data)
    for given, public, trusted in (
        (token, False, True), (None, False, True), (None, True, False), (None, False, False),
        (token, True, False), (token, False, True), (None, False, True),
    ):  # fmt: skip
        site.join("https://localhost:9", given, public)
        site.link.close()
        assert (place / "ca.pem").exists() is trusted
    site._held.close()
