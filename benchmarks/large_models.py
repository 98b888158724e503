"""A large model served: random weights of GPT-2 Large's shapes, on loopback, process by process.

Real `atoll serve` and `atoll join` processes (TLS, SQLite) run FedAvg and Mean over 774 million
parameters (3.1 GB): 36 layers, 1280 wide, 50,257 words, 1,024 places. A site's training adds a
small constant to its own copy, so that what is measured is the federation and not the learner.
For each number of sites: the peak of every process's resident memory, seconds of a round by phase,
processor time, gigabytes moved and written. GB are 10^9 bytes.

    python benchmarks/large_models.py --scale 0.25           # 0.8 GB; results/large_models.json
    python benchmarks/large_models.py --sites 1 2 3          # the whole of it; needs 60 GB of disk

Others' use of the machine shows in seconds, less in processor time, and not in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "large_models.json"
#: Read by every process: the federation, and a clock on what each of them does.
FEDERATION = '''
import json, math, os, time
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path

import numpy as np

from atoll import Federation, algorithms, schedules
from atoll.aggregation import Mean
from atoll.core.vectors import Layout
from atoll.learners.base import Learner, LocalResult

TILE = 1 << 18
LAYERS, WIDTH, WORDS, PLACES = {layers}, 1280, {words}, 1024


def shapes():
    yield "wte.weight", (WORDS, WIDTH)
    yield "wpe.weight", (PLACES, WIDTH)
    for n in range(LAYERS):
        for name, shape in (
            ("ln_1", (WIDTH,)), ("attn.c_attn", (WIDTH, 3 * WIDTH)),
            ("attn.c_proj", (WIDTH, WIDTH)), ("ln_2", (WIDTH,)),
            ("mlp.c_fc", (WIDTH, 4 * WIDTH)), ("mlp.c_proj", (4 * WIDTH, WIDTH)),
        ):
            yield f"h.{{n}}.{{name}}.weight", shape
            yield f"h.{{n}}.{{name}}.bias", shape[-1:]
    yield "ln_f.weight", (WIDTH,)
    yield "ln_f.bias", (WIDTH,)


@dataclass(frozen=True, eq=False)
class Large(Learner):
    """Random weights; training adds a small constant of its key's."""

    @cached_property
    def layout(self):
        blank = np.zeros(1, np.float32)
        return Layout.of({{name: np.broadcast_to(blank, shape) for name, shape in shapes()}})

    def init(self, key):
        model, rng = np.empty(self.layout.size, np.float32), key.generator()
        for start in range(0, len(model), TILE):
            part = model[start : start + TILE]
            rng.standard_normal(out=part, dtype=np.float32)
            part *= np.float32(0.02)
        return {{"params": model}}

    def train(self, model, examples, assignment, correction=None, objective=None):
        params = np.array(model["params"])
        added = np.float32(assignment.key.generator().uniform(-1e-3, 1e-3))
        for start in range(0, len(params), TILE):
            params[start : start + TILE] += added
        return LocalResult(params, 1, 0.1, len(examples), len(examples), 0.0)

    def evaluate(self, model, examples, task, classes):
        return {{}}

    def planned_steps(self, examples):
        return 1


federation = Federation(
    learner=Large(),
    algorithm=algorithms.FedAvg(),
    pipeline=Mean(),
    schedule=schedules.Synchronous(rounds={rounds}, cohort={sites}, minimum={sites}),
)


def timed(owner, name, phase):
    call = getattr(owner, name)

    @wraps(call)
    def run(*given, **named):
        began = time.time()
        try:
            return call(*given, **named)
        finally:
            line = json.dumps([phase, began, time.time()])
            with (Path("events") / f"{{os.getpid()}}.jsonl").open("a") as file:
                file.write(line + "\\n")

    setattr(owner, name, run)


Path("events").mkdir(exist_ok=True)
try:
    from atoll.site import agent
    from atoll.site.connection import Connection
    from atoll.service.storage.models import ModelStore
    timed(Connection, "fetch", "download")
    timed(Connection, "upload", "upload")
    timed(agent, "run_task", "train")
    timed(ModelStore, "fault", "check")
    timed(ModelStore, "fold", "fold")
    timed(ModelStore, "step", "step")
    timed(ModelStore, "keep", "keep")
    from atoll.rounds.driver import Driver
    timed(Driver, "hear", "close")
except ImportError:  # who only reads the plan needs no clock
    pass
'''
SITE = """
import numpy as np

from atoll.data.examples import Examples
from atoll.data.federated import FederatedData

x, y = np.zeros((20, 4), np.float32), np.arange(20) % 2
rows = (np.arange(20),)
data = FederatedData(
    "nothing", "classification", 2, ("a", "b"), ("{name}",), x, y, rows, rows,
    Examples(x, y, rows[0]),
)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
GB = 1e9
LAYERS, WORDS, WIDTH, PLACES = 36, 50257, 1280, 1024
#: Seconds between two looks at a process, and after which a run is given up.
LOOK, PATIENCE = 0.02, 3600.0


class Watched:
    """A process, and the highest that was seen of its memory."""

    def __init__(self, root: Path, name: str, *words: str) -> None:
        self.name = name
        with (root / f"{name}.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "atoll", *words],
                cwd=root, env=ENVIRONMENT, stdout=log, stderr=log,
            )  # fmt: skip
        self.highest: dict[str, float] = defaultdict(float)
        self.written = self.cpu = 0.0

    def look(self) -> None:
        place = Path(f"/proc/{self.process.pid}")
        names = {"VmHWM": "peak", "RssAnon": "anon", "RssFile": "file", "RssShmem": "shared"}
        try:
            for line in (place / "status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in names:
                    value = int(rest.split()[0]) * 1024 / GB
                    self.highest[names[name]] = max(self.highest[names[name]], value)
            io = dict(line.split(": ") for line in (place / "io").read_text().splitlines())
            self.written = (int(io["write_bytes"]) - int(io["cancelled_write_bytes"])) / GB
            times = (place / "stat").read_text().rpartition(")")[2].split()
            self.cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, KeyError, IndexError):  # it has ended
            return

    def figures(self, model: float) -> dict[str, Any]:
        found: dict[str, Any] = {f"{k}_gb": round(v, 3) for k, v in self.highest.items()}
        found["peak_models"] = round(self.highest["peak"] / model, 2)
        return {**found, "written_gb": round(self.written, 2), "cpu_s": round(self.cpu, 1)}


def cli(root: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "atoll", *words],
        cwd=root, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"atoll {' '.join(words)}: {done.stderr}")
    return done.stdout.strip()


def size_of(layers: int, words: int) -> int:
    """Bytes of the model."""
    dense = [(1, 3), (1, 1), (1, 4), (4, 1)]
    block = sum(i * o * WIDTH * WIDTH + o * WIDTH for i, o in dense) + 4 * WIDTH
    return 4 * ((words + PLACES) * WIDTH + layers * block + 2 * WIDTH)


def federated(root: Path, sites: int, rounds: int, layers: int, words: int) -> dict[str, Any]:
    """One federation from beginning to end."""
    text = FEDERATION.format(layers=layers, words=words, rounds=rounds, sites=sites)
    (root / "federation.py").write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cli(root, "init", "state", "--host", "127.0.0.1")
    names = [f"site-{number}" for number in range(sites)]
    tokens = {name: cli(root, "invite", "state", name).split()[-1] for name in names}
    server = Watched(
        root, "server", "serve", "federation.py", "--state", "state", "--host", "127.0.0.1",
        "--port", str(port), "--sites", str(sites),
    )  # fmt: skip
    everyone, over = [server], threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            for each in everyone:
                each.look()

    watching = threading.Thread(target=watch)
    watching.start()
    disk, lowest = shutil.disk_usage(root).free, shutil.disk_usage(root).free
    try:
        for name in names:
            (root / f"{name}.py").write_text(SITE.format(name=name))
            everyone.append(
                Watched(
                    root, name, "join", f"https://127.0.0.1:{port}", "federation.py", "--data",
                    f"{name}.py", "--folder", name, "--token", tokens[name],
                )
            )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while any(each.process.poll() is None for each in everyone):
            lowest = min(lowest, shutil.disk_usage(root).free)
            if time.monotonic() > end or any(each.process.poll() for each in everyone):
                raise SystemExit(
                    "\n".join((root / f"{e.name}.log").read_text()[-2000:] for e in everyone)
                )
            time.sleep(0.1)
    finally:
        over.set()
        watching.join()
        for each in everyone:
            if each.process.poll() is None:
                each.process.send_signal(signal.SIGKILL)
                each.process.wait()
    model = size_of(layers, words) / GB
    return {
        "sites": sites,
        "model_gb": round(model, 3),
        "server": server.figures(model),
        "agents": [each.figures(model) for each in everyone[1:]],
        "disk_gb": round((disk - lowest) / GB, 2),
        "rounds": phases(root, sites, model),
        "cpu_s_per_gb": round(sum(e.cpu for e in everyone) / (2 * sites * rounds * model), 2),
    }


def phases(root: Path, sites: int, model: float) -> list[dict[str, float]]:
    """Seconds of every round, by phase: from first to last where sites are at it together."""
    events: list[list[Any]] = []
    for path in (root / "events").glob("*.jsonl"):
        events += [json.loads(line) for line in path.read_text().splitlines()]
    ends = sorted(stop for name, _, stop in events if name == "keep")
    found = []
    for before, after in pairwise(ends):
        here = [each for each in events if before <= each[1] and each[2] <= after + 1]
        own: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, start, stop in here:
            if start < after:
                own[name].append((start, stop))
        row = {}
        for name in ("download", "train", "upload"):
            row[name] = max(b for _, b in own[name]) - min(a for a, _ in own[name])
        for name in ("check", "fold", "close", "step", "keep"):
            row[name] = sum(b - a for a, b in own[name])
        seconds = after - min(a for a, _ in own["download"])
        moved = 2 * sites * model
        row = {"seconds": seconds, "gb_moved": moved, "s_per_gb": seconds / moved, **row}
        found.append({name: round(value, 2) for name, value in row.items()})
    return found


def disk_speed(root: Path) -> float:
    """GB a second, of 1 GB that is written and synced."""
    block, path = os.urandom(1 << 24), root / "disk"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(60):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return round(60 * len(block) / GB / seconds, 2)


def machine(root: Path) -> dict[str, Any]:
    """What the figures were taken on, and with."""
    pairs = (line.split(": ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines())
    found = {pair[0].strip(): pair[1] for pair in pairs if len(pair) == 2}
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "date": date.today().isoformat(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1), "memory_gb": round(int(memory) * 1024 / GB, 1),
        "disk_gb_per_second": disk_speed(root),
        "processor": f"{found.get('model name', platform.machine())} (family "
        f"{found.get('cpu family')}, model {found.get('model')})",
        "kernel": platform.release(), "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION, "atoll": version("atoll"), "numpy": version("numpy"),
    }  # fmt: skip


def main() -> int:
    # Whoever ends this ends its processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of layers and words")
    parser.add_argument("--sites", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the disk is to be used")
    parser.add_argument("--label", default="", help="what the figures are filed under")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    layers, words = max(1, round(LAYERS * given.scale)), max(1, round(WORDS * given.scale))
    label = given.label or f"{size_of(layers, words) / GB:.1f} GB"
    figures = []
    for sites in given.sites:
        with tempfile.TemporaryDirectory(prefix="atoll-large-", dir=given.folder) as root:
            about = machine(Path(root))
            found = federated(Path(root), sites, given.rounds, layers, words)
        figures.append(found)
        worst = max(agent["peak_models"] for agent in found["agents"])
        print(
            f"{sites} sites of {found['model_gb']} GB: server {found['server']['peak_models']} "
            f"models, agents up to {worst}; {found['cpu_s_per_gb']} s of processor a GB moved"
        )
        print("  server", found["server"], "\n  agent", found["agents"][0])
        for row in found["rounds"]:
            print("  round", row)
        sys.stdout.flush()
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        known[label] = {"machine": about, "runs": figures}
        given.out.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
