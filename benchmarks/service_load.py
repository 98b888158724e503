"""The service under load: a real `atoll serve` (TLS, SQLite) on loopback, and its clients.

clients   500 light clients through whole synchronous rounds of softmax regression (64 to 10)
checkins  10,000 clients that check in, and as many long polls that are held at the same time
uploads   8 updates of 200 MB at the same time, and the round that they close

    python benchmarks/service_load.py                      # all three; results/service_load.json
    python benchmarks/service_load.py uploads --megabytes 50
    python benchmarks/service_load.py --clients 20 --checkins 200 --megabytes 8 --out /tmp/x.json

All clients live on one event loop here and ask as fast as they are answered, so latencies include
the queues on both sides; those of check-ins in rounds and of held ones include the waiting. An
answer other than the expected one ends the benchmark. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import Request, urlopen

import numpy as np
import psutil
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.cli.files import read_plan
from atoll.core.updates import Update
from atoll.protocol import messages
from atoll.protocol.certificates import client_context
from atoll.protocol.identity import ENROL, OPEN, Token, public_key, seal
from atoll.rounds.describe import plan_digest
from atoll.rounds.messages import pack
from atoll.service.storage.folder import StateFolder, add_token
from atoll.service.storage.tables import sites

RESULTS = Path(__file__).parent / "results" / "service_load.json"
FEDERATION = """
from atoll import Federation, algorithms, learners, schedules

federation = Federation(
    learner=learners.NumpyLearner(layers=({inputs}, {outputs}), lr=0.1),
    algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds={rounds}, cohort={cohort}, minimum={cohort}),
)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
CHUNK, MB = 1 << 20, 1e6
#: Seconds: for any one answer, for others to fail too once one has, and of a long poll.
PATIENCE, GRACE, WAIT = 300.0, 3.0, 60.0
#: Clients that connect or check in at the same time where none waits for another.
AT_ONCE = 200
#: What the server's memory should stay below: so much, and two models.
TARGET_MB = 300


class Failed(Exception):
    """A request failed, or was answered otherwise than it should be."""


class Server:
    """A server process in a folder of its own, what it was asked, and a watch on its memory."""

    def __init__(self, root: Path, *words: str, **shape: int) -> None:
        self.root, self.words = root, words
        (root / "federation.py").write_text(FEDERATION.format(**shape))
        self.plan = read_plan(str(root / "federation.py"))
        self.folder = StateFolder.make(root / "state", "load", ["127.0.0.1"])
        self.tls = client_context(self.folder.authority)
        plan, layout = plan_digest(self.plan), self.plan.learner.layout.digest
        about = {"atoll": version("atoll")}
        self.greeting = messages.write(messages.CheckIn(plan, layout, 100, about=about))
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.failed: list[str] = []
        self.phases: dict[str, dict[str, float]] = {}
        self.peaks: dict[str, float] = {}
        self._over = threading.Event()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    async def __aenter__(self) -> Server:
        words = [sys.executable, "-m", "atoll", "serve", "federation.py", "--state", "state"]
        words += ["--host", "127.0.0.1", "--port", str(self.port), *self.words]
        with (self.root / "log").open("w") as log:
            self.process = psutil.Popen(
                words, cwd=self.root, env=ENVIRONMENT, stdout=log, stderr=log
            )
        threading.Thread(target=self._watch, daemon=True).start()
        while self.process.poll() is None:
            try:
                await asyncio.to_thread(self.page, "/health")
                return self
            except OSError:  # not there yet, or not leading
                await asyncio.sleep(0.1)
        raise Failed(f"the server did not start: {(self.root / 'log').read_text()[-2000:]}")

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = await asyncio.to_thread(self.process.wait, 30)
        except psutil.TimeoutExpired:
            self.process.kill()
            status = "none, so that it was killed"
        if error is not None or status != 0:
            print((self.root / "log").read_text()[-2000:], file=sys.stderr)
            raise Failed(str(error or f"the server ended with status {status}"))

    def page(self, target: str) -> str:
        token = (self.folder.path / "metrics.token").read_text()
        url = f"https://127.0.0.1:{self.port}{target}"
        request = Request(url, headers={"Authorization": f"Bearer {token}"})
        with urlopen(request, context=self.tls) as answer:
            return str(answer.read().decode())

    def parked(self) -> int:
        """How many long polls it holds, as it says itself."""
        return int(float(self.page("/metrics").split("\natoll_long_polls ")[1].split()[0]))

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def memory(self) -> dict[str, float]:
        """MB now, and the kernel's own highest since `forget`."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines())
        names = {"rss": "VmRSS", "anon": "RssAnon", "file": "RssFile", "highest": "VmHWM"}
        return {k: round(int(lines[v].split()[0]) * 1024 / MB, 1) for k, v in names.items()}

    def forget(self) -> None:
        """Look for the highest from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        self.peaks = {}

    def peak(self) -> dict[str, float]:
        """The highest of each since `forget`: sampled, but for the kernel's own."""
        for name, value in self.memory().items():
            self.peaks[name] = max(self.peaks.get(name, 0.0), value)
        return {f"{name}_mb": value for name, value in self.peaks.items()}

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            try:
                self.peak()
            except (OSError, KeyError):  # it has ended
                return

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within: requests, seconds, processor time on both sides."""
        count, cpu, own = self.requests(), self.cpu(), time.process_time()
        started = time.perf_counter()
        yield
        seconds, asked = time.perf_counter() - started, self.requests() - count
        used, own = self.cpu() - cpu, time.process_time() - own
        self.phases[name] = {
            "requests": asked, "seconds": round(seconds, 2), "per_second": round(asked / seconds),
            "server_us_each": round(1e6 * used / max(asked, 1)), "server_s": round(used, 2),
            "server_busy": round(used / seconds, 2), "client_busy": round(own / seconds, 2),
        }  # fmt: skip

    def requests(self) -> int:
        return sum(len(each) for kind, each in self.seconds.items() if kind != "connect")

    def figures(self, **more: Any) -> dict[str, Any]:
        """Everything that was found; latencies in milliseconds."""
        latencies = {}
        for kind, each in self.seconds.items():
            p50, p99, most = np.quantile(np.array(each) * 1e3, [0.5, 0.99, 1.0]).round(2)
            latencies[kind] = {"n": len(each), "p50_ms": p50, "p99_ms": p99, "max_ms": most}
        return {**more, "failed": len(self.failed), "phases": self.phases, "latencies": latencies}


class Client:
    """One site, on a connection that is kept."""

    def __init__(self, server: Server, number: int) -> None:
        self.server, self.name = server, f"site-{number:05d}"
        self.key, self.secret = Ed25519PrivateKey.generate(), Token.fresh("").secret
        self.rng = np.random.default_rng(number)
        self._session, self._seal_key, self._counter = "", b"", 0
        self._writer: asyncio.StreamWriter | None = None

    async def enrol(self) -> None:
        signature = self.key.sign(ENROL + bytes.fromhex(self.secret)).hex()
        message = messages.Enrol(self.secret, public_key(self.key), signature)
        await self.ask("enrol", "POST", "/v1/enrol", messages.write(message))

    async def open(self) -> None:
        asked = messages.write(messages.Challenge(self.name))
        _, data, _ = await self.ask("challenge", "POST", "/v1/challenge", asked)
        nonce = messages.read(messages.Challenge, data).nonce or ""
        signature = self.key.sign(OPEN + bytes.fromhex(nonce)).hex()
        body = messages.write(messages.OpenSession(self.name, nonce, signature))
        _, data, _ = await self.ask("session", "POST", "/v1/session", body)
        opened = messages.read(messages.SessionOpened, data)
        self._session, self._seal_key = opened.session, bytes.fromhex(opened.key)

    async def check_in(self, wait: float, *expect: str, kind: str = "check-in") -> messages.Order:
        target, body = f"/v1/checkin?wait={wait:g}", self.server.greeting
        _, data, _ = await self.ask(kind, "POST", target, body)
        order = messages.read(messages.Order, data)
        if order.kind not in expect:
            self.fail(kind, f"an order to {order.kind} ({order.reason}), not {expect}")
        return order

    async def fetch(self, order: messages.Order) -> None:
        _, _, digest = await self.ask("model", "GET", f"/v1/blobs/{order.model}")
        if digest != order.model:
            self.fail("model", "another model than the one asked for")

    async def upload(self, order: messages.Order, update: messages.Offer, *pieces: Any) -> None:
        offer = messages.write(messages.Offer(order.assignment or "", update.size, update.sha256))
        headers, _, _ = await self.ask("offer", "POST", "/v1/uploads", offer, expect=201)
        answer = await self.ask(
            "upload", "PATCH", headers["location"], *pieces, stands=f"0:{update.size}",
            more="Upload-Offset: 0\r\n",
        )  # fmt: skip
        if messages.read(messages.Verdict, answer[1]).verdict != "accepted":
            self.fail("upload", str(answer[1]))

    async def rounds(self) -> None:
        """Take part until the end, with random updates."""
        while (order := await self.check_in(WAIT, "train", "wait", "stop")).kind != "stop":
            if order.kind == "train":
                await self.fetch(order)
                size, weight = self.server.plan.learner.layout.size, self.rng.integers(1, 100)
                vector = self.rng.normal(scale=0.01, size=size).astype(np.float32)
                await self.upload(order, *packed(vector, float(weight)))

    async def ask(
        self, kind: str, method: str, target: str, *pieces: Any, stands: str = "",
        expect: int = 200, more: str = "",
    ) -> tuple[dict[str, str], bytes, str]:  # fmt: skip
        """One request; the answer's headers, the first MiB of its body, and the body's digest."""
        length = sum(map(len, pieces))
        head = f"{method} {target} HTTP/1.1\r\nHost: load\r\nContent-Length: {length}\r\n{more}"
        if self._session:
            self._counter += 1
            text = stands or sha256(b"".join(pieces)).hexdigest()
            sealed = seal(self._seal_key, method, target, self._counter, text)
            head += f"Atoll-Session: {self._session}\r\nAtoll-Counter: {self._counter}\r\n"
            head += f"Atoll-Seal: {sealed}\r\n"
        try:
            async with asyncio.timeout(PATIENCE):
                if self._writer is None or self._reader.at_eof():
                    started = time.perf_counter()
                    self._reader, self._writer = await asyncio.open_connection(
                        "127.0.0.1", self.server.port, ssl=self.server.tls, limit=CHUNK
                    )
                    self.server.seconds["connect"].append(time.perf_counter() - started)
                started = time.perf_counter()
                self._writer.write(head.encode() + b"\r\n")
                for piece in pieces:
                    for start in range(0, len(piece), CHUNK):
                        self._writer.write(piece[start : start + CHUNK])
                        await self._writer.drain()
                status, answer = await self._answer()
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            self.fail(kind, repr(error))
        if status != expect:
            self.fail(kind, f"status {status}, not {expect}: {answer[1][:300]!r}")
        self.server.seconds[kind].append(time.perf_counter() - started)
        return answer

    async def _answer(self) -> tuple[int, tuple[dict[str, str], bytes, str]]:
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        left, digest, data = int(headers.get("content-length", "0")), sha256(), b""
        while left:
            piece = await self._reader.readexactly(min(left, CHUNK))
            digest.update(piece)
            data, left = data or piece, left - len(piece)
        return int(first.split()[1]), (headers, data, digest.hexdigest())

    def fail(self, kind: str, reason: str) -> NoReturn:
        self.server.failed.append(kind)
        raise Failed(f"{self.name}: {kind}: {reason}")


def packed(vector: np.ndarray, weight: float) -> tuple[Any, ...]:
    """The offer (of no assignment yet) and the bytes of an update."""
    pieces, digest = pack(Update({"delta": vector}, weight, metrics={"train_loss": 1.0})), sha256()
    for piece in pieces:
        digest.update(piece)
    return messages.Offer("0.0.0", sum(map(len, pieces)), digest.hexdigest()), *pieces


async def everyone(
    crowd: Sequence[Client], job: Callable[[Client], Awaitable[Any]], at_once: int = 0
) -> list[Any]:
    """Let every client do something; once one fails, those that fail at the same time count."""
    gate = asyncio.Semaphore(at_once or len(crowd))

    async def one(client: Client) -> Any:
        async with gate:
            return await job(client)

    tasks = [asyncio.create_task(one(client)) for client in crowd]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    _, late = await asyncio.wait(tasks, timeout=GRACE)
    for task in late:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [each for each in found if isinstance(each, Exception)]
    if errors:
        raise Failed(f"{len(errors)} of {len(crowd)} clients failed, the first: {errors[0]}")
    return found


def invited(server: Server, count: int, *, enrolled: bool = False) -> list[Client]:
    """Clients whose tokens, or who themselves, are in the server's tables: one transaction."""
    crowd, store = [Client(server, number) for number in range(count)], server.folder.store()
    with store.change(leading=False) as change:
        if enrolled:
            about = {"role": "site", "status": "active", "joined": 0.0, "seen": 0.0}
            rows = [{"name": c.name, "key": public_key(c.key), **about} for c in crowd]
            change.connection.execute(sites.insert(), rows)
        else:
            for c in crowd:
                add_token(change, c.secret, c.name, "site", time.time() + 3600)
    store.close()
    return crowd


async def clients(given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Whole rounds with many light clients."""
    server = Server(root, inputs=64, outputs=10, rounds=given.rounds, cohort=given.clients)
    crowd = invited(server, given.clients)
    async with server:
        idle = server.memory()
        with server.phase("enrol"):
            await everyone(crowd, Client.enrol, AT_ONCE)
        with server.phase("sessions"):
            await everyone(crowd, Client.open, AT_ONCE)
        with server.phase("rounds"):
            await everyone(crowd, Client.rounds)
        rate = given.rounds / server.phases["rounds"]["seconds"]
        return server.figures(
            clients=given.clients, rounds=given.rounds, rounds_per_second=round(rate, 3),
            idle=idle, peak=server.peak(),
        )  # fmt: skip


async def checkins(given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Many clients that ask and are told to wait, and that wait for news all at once."""
    count = min(given.checkins, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)
    # One more site is wanted than there is, so that no round begins.
    server = Server(root, "--sites", str(count + 1), inputs=64, outputs=10, rounds=1, cohort=count)
    crowd = invited(server, count, enrolled=True)
    async with server:
        memory = {"idle": server.memory()}
        with server.phase("sessions"):
            await everyone(crowd, Client.open, AT_ONCE)
        memory["connected"] = server.memory()
        for name in ("first check-in", "later check-in"):
            with server.phase(name):
                await everyone(crowd, lambda c, k=name: c.check_in(0, "wait", kind=k), AT_ONCE)
        memory["checked in"] = server.memory()
        with server.phase("park"):
            polls = asyncio.create_task(
                everyone(crowd, lambda c: c.check_in(WAIT, "stop", kind="held check-in"))
            )
            while not polls.done() and await asyncio.to_thread(server.parked) < count:
                await asyncio.sleep(0.2)
        memory["parked"] = server.memory()
        store = server.folder.store()
        with store.change(leading=False) as change:  # as `atoll stop` does
            change.set("stop", True)
        store.close()
        with server.phase("wake"):
            await polls
        anon = {name: each["anon"] * MB / 1e3 / count for name, each in memory.items()}
        return server.figures(
            clients=count, memory_mb=memory, peak=server.peak(),
            kb_per_connection=round(anon["connected"] - anon["idle"], 1),
            kb_per_parked_poll=round(anon["parked"] - anon["checked in"], 1),
        )  # fmt: skip


async def uploads(given: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Large updates at the same time, and the closing of their round."""
    count, model = given.uploads, given.megabytes
    server = Server(root, inputs=250 * model, outputs=1000, rounds=1, cohort=count)
    crowd = invited(server, count)
    size = server.plan.learner.layout.size
    vector = crowd[0].rng.standard_normal(size, dtype=np.float32)
    updates = {c: packed(vector, 1.0 + number) for number, c in enumerate(crowd)}
    gigabytes = sum(update[0].size for update in updates.values()) / 1e9
    async with server:
        peaks = {"start": server.peak()}
        await everyone(crowd, Client.enrol)
        await everyone(crowd, Client.open)
        orders = await everyone(crowd, lambda c: c.check_in(WAIT, "train"))
        work = dict(zip(crowd, orders, strict=True))
        idle = server.memory()
        for name, job in {
            "download": lambda c: c.fetch(work[c]),
            "upload": lambda c: c.upload(work[c], *updates[c]),
            "close": lambda c: c.check_in(WAIT, "stop", kind="close"),
        }.items():
            server.forget()
            with server.phase(name):
                await everyone(crowd, job)
            peaks[name] = server.peak()
        spent = {name: phase["server_s"] / gigabytes for name, phase in server.phases.items()}
        rates = {n: 1e3 * gigabytes / server.phases[n]["seconds"] for n in ("download", "upload")}
        return server.figures(
            uploads=count, megabytes=model, target_mb=TARGET_MB + 2 * model, idle=idle,
            peaks=peaks, mb_per_second={name: round(rate, 1) for name, rate in rates.items()},
            server_s_per_gb={name: round(each, 2) for name, each in spent.items()},
        )  # fmt: skip


PARTS = {"clients": clients, "checkins": checkins, "uploads": uploads}


def machine() -> dict[str, Any]:
    """What the figures were taken on, and with."""
    pairs = (line.split(": ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {pair[0].strip(): pair[1] for pair in pairs if len(pair) == 2}
    packages = ("atoll", "uvicorn", "starlette", "uvloop", "httptools", "sqlalchemy", "numpy")
    return {
        "date": date.today().isoformat(), "cores": os.cpu_count(),
        "processor": f"{found.get('model name', platform.machine())} (family "
        f"{found.get('cpu family')}, model {found.get('model')})",
        "python": platform.python_version(), "sqlite": sqlite3.sqlite_version,
        "openssl": ssl.OPENSSL_VERSION, **{name: version(name) for name in packages},
    }  # fmt: skip


def table(figures: dict[str, Any]) -> Iterator[str]:
    """One part as lines."""
    for kind in ("phases", "latencies"):
        columns = list(next(iter(figures[kind].values())))
        yield f"{kind:<16}" + "".join(f"{column:>15}" for column in columns)
        for name, row in figures[kind].items():
            yield f"{name:<16}" + "".join(f"{row[column]:>15}" for column in columns)
    for name, value in figures.items():
        if name not in ("phases", "latencies"):
            yield f"{name}: {value}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="default: all of them")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkins", type=int, default=10_000)
    parser.add_argument("--uploads", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    about = machine()
    print(json.dumps(about))
    for name in given.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="atoll-load-") as root:
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    figures = runner.run(PARTS[name](given, Path(root)))
            except Failed as error:
                print(f"{name} FAILED: {error}", file=sys.stderr)
                return 1
        print("\n".join(["", name, *table(figures)]), flush=True)
        # What was measured of other parts before stays: a suite may be run in parts.
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        known[name] = {"machine": about, **figures}
        given.out.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
