"""A federation behind nginx, through everything that happens to machines, for many rounds.

`ATOLL_SOAK_ROUNDS=300 pytest -m slow tests/service/test_soak.py` is the long one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, Place, free_port

from atoll.core.model_file import load_model

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("ATOLL_SOAK_ROUNDS", "20"))
SEED = int(os.environ.get("ATOLL_SOAK_SEED", "1"))
#: A round's pause, in which machines have time to fail; a site is given up after the lease.
PAUSE, LEASE = 0.3, 10
NAMES = [str(n) for n in range(10)]
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
NGINX = """
worker_processes 1; daemon off; pid {root}/nginx.pid; error_log {root}/nginx.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {root}/bodies; proxy_temp_path {root}/passed;
    fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
    server {{
        listen 127.0.0.1:{front} ssl;
        ssl_certificate {state}/server.pem; ssl_certificate_key {state}/server-key.pem;
        ssl_protocols TLSv1.3;
        client_max_body_size 0;
        location /one/federation/ {{
            proxy_pass https://127.0.0.1:{behind}/;
            proxy_ssl_protocols TLSv1.3; proxy_http_version 1.1;
            proxy_request_buffering off; proxy_buffering off; proxy_read_timeout 120s;
        }}
    }}
}}
"""


@dataclass
class Soak(Place):
    """Ten sites, nginx with a sub-path, a server whose folder is a small disk, and a clock each."""

    front: int = field(default_factory=free_port)
    #: What was done, and what a log is to say of it: (file, where it ended then, pattern, words).
    owed: list[tuple[str, int, str, str]] = field(default_factory=list)
    away: set[str] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.front}/one/federation"

    def start(self, name: str, *words: str) -> subprocess.Popen:
        clock = self.root / f"{name}.clock"
        if not clock.exists():
            clock.write_text("+0")
        faked = {
            "LD_PRELOAD": str(FAKETIME[0]), "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        with (self.root / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "atoll", *words],
                cwd=self.root, env={**ENVIRONMENT, **faked}, stdout=log, stderr=log,
            )  # fmt: skip
        return self.processes[name]

    def site(self, name: str, token: str = "") -> None:
        self.join(name, token, url=self.address)

    def nginx(self) -> None:
        text = NGINX.format(root=self.root, state=self.state, front=self.front, behind=self.port)
        (self.root / "nginx.conf").write_text(text)
        if "nginx" in self.processes:
            self.processes["nginx"].send_signal(signal.SIGHUP)
            return
        with (self.root / "nginx.log").open("a") as log:
            self.processes["nginx"] = subprocess.Popen(
                ["nginx", "-p", str(self.root), "-c", str(self.root / "nginx.conf")], stderr=log
            )

    def end_nginx(self) -> None:
        """End it with its worker, which would outlive a master that is killed and hold the port."""
        nginx = self.processes.pop("nginx")
        nginx.terminate()
        assert nginx.wait(30) == 0, self.log("nginx")[-2000:]

    def expect(self, log: str, pattern: str, words: str) -> None:
        """From here on this log must come to say so."""
        self.owed.append((log, len(self.log(log)), pattern, words))

    def alive(self, name: str) -> bool:
        return self.processes[name].poll() is None

    def at_work(self) -> list[str]:
        return [name for name in NAMES if self.alive(name) and name not in self.away]

    def revive(self) -> None:
        """What a service manager does: whoever ended without having been told to begins again."""
        for name in ("server", *NAMES):
            code = self.processes[name].poll()
            if code in (None, 0):
                continue
            assert code in (1, 4, 130, -signal.SIGKILL), (name, code, self.log(name)[-2000:])
            self.serve() if name == "server" else self.site(name)

    def goes_on(self, closed: int) -> None:
        """Until so many rounds have closed."""
        end = time.monotonic() + 120
        while self.closed() < min(closed, ROUNDS):
            self.revive()
            told = {name: self.log(name)[-1500:] for name in ("server", "nginx", *NAMES[:2])}
            assert time.monotonic() < end, told
            time.sleep(0.2)

    def closed(self) -> int:
        return self.log("server").count(" closed with ")


def kill_the_server(soak, rng):
    soak.expect("server", "leading state at round", "the server was killed")
    soak.kill("server")
    time.sleep(rng.uniform(0, 2))
    soak.serve()


def move_the_server(soak, rng):
    soak.expect("server", "leading state at round", "the server was stopped and moved")
    soak.processes["server"].send_signal(signal.SIGTERM)
    soak.wait("server", 30)
    soak.port = free_port()
    soak.serve()
    soak.nginx()


def kill_a_site(soak, rng):
    name = rng.choice(soak.at_work())
    soak.expect(name, r"round \d+ of|round \d+: |update |stopped|done", f"{name} was killed")
    soak.kill(name)
    time.sleep(rng.uniform(0, 1))
    soak.site(name)


def stop_a_site(soak, rng):
    name = rng.choice(soak.at_work())
    soak.expect("server", f"{name} has left: it said that it leaves", f"{name} was stopped")
    soak.processes[name].send_signal(signal.SIGTERM)
    assert soak.wait(name, 30) in (0, 130)
    time.sleep(rng.uniform(0, 2))
    soak.site(name)


def hang_a_site(soak, rng):
    name = rng.choice(soak.at_work())
    soak.expect("server", f"{name} does not deliver .*not heard of", f"{name} hung")
    soak.processes[name].send_signal(signal.SIGSTOP)
    end = time.monotonic() + 60
    while f"{name} does not deliver" not in soak.log("server")[soak.owed[-1][1] :]:
        soak.revive()
        assert time.monotonic() < end, soak.log("server")[-2000:]
        time.sleep(0.2)
    soak.processes[name].send_signal(signal.SIGCONT)


def fill_the_disk(soak, rng):
    soak.expect("server", r"[Nn]o space|disk is full", "the server's disk filled")
    filler = soak.state / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 65536)
                file.flush()
        except OSError:
            pass
    end = time.monotonic() + rng.uniform(4, 8)
    while time.monotonic() < end:
        soak.revive()
        time.sleep(0.3)
    filler.unlink()


def shift_the_servers_clock(soak, rng):
    said = "passed unseen|taken back by this machine's clock"
    soak.expect("server", said, "the server's clock was set")
    # By minutes, as a machine's is that was without its time server, or slept.
    (soak.root / "server.clock").write_text(f"{rng.choice([-1, 1]) * rng.randint(60, 5000):+d}")


def shift_a_sites_clock(soak, rng):
    name = rng.choice(soak.at_work())
    soak.expect(name, r"round \d+ of", f"{name}'s clock was set")
    (soak.root / f"{name}.clock").write_text(f"{rng.randint(-1000, 1000):+d}")


def renew_the_certificate(soak, rng):
    soak.expect("server", "certificate is another now", "the certificate was made anew")
    soak.cli("hosts", "state", "127.0.0.1", "localhost")
    soak.nginx()


def revoke_and_invite_again(soak, rng):
    name = rng.choice(soak.at_work())
    soak.expect("server", f"{name} was revoked", f"{name} was revoked")
    soak.expect("server", f"{name} has joined", f"{name} was invited again")
    soak.away.add(name)
    soak.cli("revoke", "state", name)
    code = soak.wait(name, 60)
    assert code == 4, soak.log(name)[-2000:]
    assert "revoked" in soak.log(name)
    soak.site(name, soak.invite(name))
    soak.away.discard(name)


def restart_nginx(soak, rng):
    soak.expect(rng.choice(soak.at_work()), "trying again", "nginx was away")
    soak.end_nginx()
    time.sleep(rng.uniform(1, 3))
    soak.nginx()


FAULTS = [
    kill_the_server, move_the_server, kill_a_site, stop_a_site, hang_a_site, fill_the_disk,
    shift_the_servers_clock, shift_a_sites_clock, renew_the_certificate, revoke_and_invite_again,
    restart_nginx,
]  # fmt: skip


@pytest.fixture
def soak(tmp_path):
    if not shutil.which("nginx") or not FAKETIME or os.geteuid() != 0:
        pytest.skip("needs nginx, libfaketime (apt-get install nginx-light faketime) and root")
    made = Soak(tmp_path, clients=len(NAMES))
    made.state.mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(made.state)]
    if subprocess.run(disk, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        yield made
    finally:
        if "nginx" in made.processes:
            made.end_nginx()
        made.close()
        subprocess.run(["umount", "-l", str(made.state)], check=False)


def test_a_federation_outlives_what_happens_to_machines(soak):
    rng = random.Random(SEED)
    soak.write(
        schedule=f"Synchronous(rounds={ROUNDS}, minimum=5, attempts=1000, pause={PAUSE})",
    )
    soak.cli("init", "state", "--host", "127.0.0.1")
    tokens = {name: soak.invite(name) for name in NAMES}
    soak.serve("--linger", "60", "--lease", str(LEASE), "--sites", str(len(NAMES)))
    soak.nginx()
    for name, token in tokens.items():
        soak.site(name, token)
    soak.until(lambda: soak.closed() >= 1, 120, what="the first round")
    # Every kind once, in an order of the seed, and then whatever comes; between two of them it
    # goes on for a round or more.
    kinds, began = rng.sample(FAULTS, len(FAULTS)), time.monotonic()
    done: list[str] = []
    while soak.closed() < ROUNDS - 3:
        fault = kinds[len(done)] if len(done) < len(kinds) else rng.choice(FAULTS)
        print(f"{time.monotonic() - began:6.1f} s, round {soak.closed()}: {fault.__name__}")
        fault(soak, rng)
        done.append(fault.__name__)
        soak.goes_on(soak.closed() + rng.randint(1, max(3, ROUNDS // 40)))
    ended(soak)
    print(f"{len(done)} faults, {soak.closed()} rounds, {time.monotonic() - began:.0f} s")
    print(json.dumps({name: done.count(name) for name in sorted(set(done))}))


def ended(soak) -> None:
    """All are done; nothing is lost, nothing is doubled, all was said."""
    end = time.monotonic() + 120
    while any(soak.alive(name) for name in ("server", *NAMES)):
        soak.revive()
        assert time.monotonic() < end, [name for name in soak.processes if soak.alive(name)]
        time.sleep(0.3)
    for name in ("server", *NAMES):
        assert soak.processes[name].poll() == 0, (name, soak.log(name)[-2000:])
        assert "Traceback" not in soak.log(name), soak.log(name)[-5000:]
    for log, since, pattern, words in soak.owed:
        assert re.search(pattern, soak.log(log)[since:]), f"{words}, and {log}'s log is silent"
    assert "holds" in soak.cli("audit", "verify", "state")
    status = json.loads(soak.cli("status", "state", "--json"))
    assert (status["phase"], status["round"]) == ("done", ROUNDS)
    with sqlite3.connect(soak.state / "atoll.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = database.execute(
            "SELECT id, site, round, state, counted FROM assignments"
        ).fetchall()
        closed = database.execute("SELECT round FROM rounds WHERE state = 'closed'").fetchall()
        records = database.execute("SELECT round, record FROM rounds WHERE state = 'closed'")
        told = {round: json.loads(record)["accepted"] for round, record in records}
    database.close()
    assert sorted(round for (round,) in closed) == list(range(1, ROUNDS + 1))
    counted = [(site, round) for _, site, round, state, in_ in rows if in_ is not None]
    assert len(counted) == len(set(counted))  # nobody is twice in a round
    for round in range(1, ROUNDS + 1):
        assert sum(r == round for _, r in counted) == told[round] >= 5
    # An update that was acknowledged is in its round, or its whole attempt was given up.
    acknowledged = {
        id
        for name in NAMES
        for id in re.findall(r"update (\S+) \(\d+ bytes\): accepted", soak.log(name))
    }
    known = {id: (state, in_) for id, _, _, state, in_ in rows}
    for id in acknowledged:
        state, in_ = known[id]
        assert (state == "accepted") == (in_ is not None), (id, state, in_)
        assert state in ("accepted", "spared"), (id, state)
    models = {
        load_model(soak.root / name / "model.safetensors").vectors["params"].tobytes()
        for name in NAMES
    }
    assert len(models) == 1
