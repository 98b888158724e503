"""The network between sites and server delays, cuts and repeats; updates arrive once and whole."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import urllib3
from test_federation import model_of, simulated

from atoll.cli.files import read_plan
from atoll.core import safetensors
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.protocol import messages
from atoll.protocol.certificates import client_context
from atoll.protocol.identity import Token, make_key
from atoll.rounds.describe import plan_digest
from atoll.rounds.messages import pack
from atoll.site.connection import Connection, Refusal, find_authority

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow


@contextmanager
def rough_network(port: int, seed: int = 0):
    """A proxy that delays what passes and cuts some connections in the middle; its port."""
    rng, cuts, closing = random.Random(seed), [0], threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)

    def pump(source, target, budget):
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(rng.uniform(0, 0.01))
                if budget is not None:
                    budget -= len(data)
                    if budget < 0:
                        target.sendall(data[: len(data) // 2])
                        cuts[0] += 1
                        break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept():
        while not closing.is_set():
            try:
                near, _ = listener.accept()
            except TimeoutError:
                continue
            far = socket.create_connection(("127.0.0.1", port))
            # Most connections are cut after so many bytes, on the way up or down.
            budget = rng.randrange(2_000, 600_000) if rng.random() < 0.85 else None
            up, down = (budget, None) if rng.random() < 0.7 else (None, budget)
            workers = [
                threading.Thread(target=pump, args=(near, far, up)),
                threading.Thread(target=pump, args=(far, near, down)),
            ]
            for worker in workers:
                worker.start()

            def bury(workers=workers, near=near, far=far):
                for worker in workers:
                    worker.join()
                near.close()
                far.close()

            threading.Thread(target=bury).start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1], cuts
    finally:
        closing.set()
        acceptor.join()
        listener.close()


def metric(place, name):
    token = (place.state / "metrics.token").read_text()
    context = client_context((place.state / "ca.pem").read_bytes())
    with urllib3.PoolManager(ssl_context=context) as pool:
        text = pool.request(
            "GET", f"{place.url}/metrics", headers={"Authorization": f"Bearer {token}"}
        ).data.decode()
    return sum(float(v) for v in re.findall(rf"^{name}(?:\{{.*\}})? ([0-9.e+]+)$", text, re.M))


def test_cut_connections_resume_part_way(place):
    place.write(schedule="Synchronous(rounds=8)")
    text = (place.root / "federation.py").read_text()
    (place.root / "federation.py").write_text(text.replace("(64, 16, 10)", "(64, 3000, 10)"))
    tokens = {str(n): place.invite(str(n)) for n in range(8)}
    place.serve("--seed", "1", "--linger", "60")
    place.until(lambda: "leading" in place.log("server"), what="the server's start")
    with rough_network(place.port) as (port, cuts):
        for name, token in tokens.items():
            place.join(name, token, url=f"https://127.0.0.1:{port}")
        place.until(lambda: metric(place, "atoll_version") == 8, 200, "the last round's closing")
        received = metric(place, "atoll_received_bytes_total")
        for name in tokens:
            assert place.wait(name, 120) == 0, place.log(name)[-3000:]
    run = simulated(place, seed=1)
    for name in tokens:
        found = model_of(place.root / name / "model.safetensors")
        assert found.tobytes() == run.model["params"].tobytes()
    assert cuts[0] > 10
    # Had each cut upload begun anew, far more than the messages themselves would have come.
    sent = sum(record.bytes_up for record in run.history)
    assert sent <= received < 1.1 * sent
    assert any("trying again" in place.log(name) for name in tokens)


class Stutter(Connection):
    """A network that repeats: every request is sent twice, and the first answer may get lost."""

    def _send(self, method, target, body, *rest, **more):
        if not isinstance(body, bytes | str) or not body:
            return super()._send(method, target, body, *rest, **more)
        first = super()._send(method, target, body, *rest, **more)
        if "/session" in target or "/challenge" in target:
            return first
        with suppress(Refusal):
            return super()._send(method, target, body, *rest, **more)
        return first


def test_repeated_and_reordered_deliveries_count_once(place):
    """By hand: two sites, one round; everything is offered, sent and asked for several times."""
    place.write(schedule="Synchronous(rounds=1)")
    tokens = [place.invite(name) for name in ("a", "b")]
    place.serve("--linger", "30")
    place.until(lambda: "leading" in place.log("server"), what="the server's start")
    links = []
    for name, text in zip("ab", tokens, strict=True):
        token = Token.read(text)
        link = Stutter(place.url, find_authority(place.url, token), make_key(place.root / name))
        link.enrol(token)
        links.append(link)
    plan = read_plan(str(place.root / "federation.py"))
    layout = plan.learner.layout
    greeting = messages.CheckIn(plan_digest(plan), layout.digest, 10)
    orders = []
    links[1].check_in(greeting, 0)  # both are there
    for link in links:
        place.until(lambda link=link: orders_of(link, greeting, orders), what="an order")
    zero = layout.zeros()["params"]
    files = []
    for n, order in enumerate(orders):
        path = place.root / f"update-{n}"
        path.write_bytes(b"".join(pack(Update({"delta": zero + n + 1}, 1.0))))
        files.append(path)
        assert order.kind == "train"
    a, b = links
    assert a.upload(files[0], orders[0].assignment).verdict == "accepted"
    # The same again, and another update for the same assignment: the first one counts.
    assert a.upload(files[0], orders[0].assignment).verdict == "duplicate"
    assert a.upload(files[1], orders[0].assignment).verdict == "duplicate"
    with pytest.raises(Refusal, match="not b's"):
        b.upload(files[0], orders[0].assignment)
    assert b.upload(files[1], orders[1].assignment).verdict == "accepted"
    place.until(lambda: a.check_in(greeting, 0).kind == "stop", what="the end")
    stop = a.check_in(greeting, 0)
    a.fetch(stop.model, stop.size, place.root / "final")
    model, _ = safetensors.decode((place.root / "final").read_bytes())
    first = plan.learner.init(Key(0).fold("init"))
    assert model["params"] == pytest.approx(first["params"] + 1.5, abs=1e-6)
    for link in links:
        link.close()


def orders_of(link, greeting, orders):
    order = link.check_in(greeting, 0.2)
    if order.kind == "train":
        orders.append(order)
    return order.kind == "train"
