"""Real servers and sites on loopback, as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FEDERATION = """
import atoll
from atoll import Federation, schedules

federation = Federation(
    learner=atoll.learners.NumpyLearner(layers=(64, 16, 10), lr=0.1, batch_size=16),
    algorithm=atoll.algorithms.{algorithm},
    schedule=schedules.{schedule},
    pipeline=atoll.aggregation.{pipeline},
)


def clients():
    return atoll.data.load("digits").dirichlet(clients={clients}, alpha=0.5, seed=0)
"""
SITE = """
import atoll

data = atoll.data.load("digits").dirichlet(clients={clients}, alpha=0.5, seed=0)
client = "{name}"
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Place:
    """A federation under test: its folder, server and sites."""

    root: Path
    port: int = field(default_factory=free_port)
    database: str = ""
    clients: int = 8
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    serving: list[str] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def cli(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "atoll", *words],
            cwd=self.root, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout.strip() if check else done.stdout + done.stderr

    def write(self, algorithm="FedAvg()", schedule="Synchronous(rounds=5)", pipeline="Mean()"):
        text = FEDERATION.format(
            algorithm=algorithm, schedule=schedule, pipeline=pipeline, clients=self.clients
        )
        (self.root / "federation.py").write_text(text)

    def start(self, name: str, *words: str) -> subprocess.Popen:
        with (self.root / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "atoll", *words],
                cwd=self.root, env=ENVIRONMENT, stdout=log, stderr=log,
            )  # fmt: skip
        return self.processes[name]

    def serve(self, *more: str) -> subprocess.Popen:
        self.serving = [*more] or self.serving
        words = ["serve", "federation.py", "--state", "state", "--port", str(self.port)]
        words += ["--database", self.database] if self.database else []
        return self.start("server", *words, *self.serving)

    def invite(self, name: str, *more: str) -> str:
        return self.cli("invite", "state", name, *more)

    def join(self, name: str, token: str = "", *more: str, url: str = "", client="") -> object:
        (self.root / f"{name}.py").write_text(
            SITE.format(name=client or name, clients=self.clients)
        )
        words = ["join", url or self.url, "federation.py", "--data", f"{name}.py", "--folder", name]
        return self.start(name, *words, *(["--token", token] if token else []), *more)

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def wait(self, name: str, seconds: float = 120) -> int:
        try:
            return self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} goes on:\n{self.log(name)[-3000:]}") from None

    def until(self, condition, seconds: float = 60, what: str = "it") -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen"
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(10)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait(10)


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    made.write()
    made.cli("init", "state", "--host", "127.0.0.1")
    yield made
    made.close()
