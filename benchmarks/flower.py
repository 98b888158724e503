"""Flower apps under Flower and under atoll, side by side: whole commands, start-up included.

python benchmarks/flower.py

Three ways for each app: `flwr run --stream` (which builds an environment for every run; numpyapp
only, because it would download another torch for the other), Flower's simulation inside the
environment that is there already (what is left when that is taken away), and `atoll flower`.
One after the other, in turns; medians are written to results/flower.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
APPS = HERE.parent / "tests" / "flower" / "apps"
BIN = Path(sys.executable).parent

#: Flower's simulation of an app folder, without building an environment first.
SIMULATION = """
import importlib, sys, tomllib
import flwr.simulation
from flwr.app import Context, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
place, name, clients, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, place)
inner = importlib.import_module("flwr.simulation.run_simulation")
run = Run.create_empty(7)
run.primary_task_id, run.federation_id = 7, inner.NOOP_FEDERATION_ID
run.override_config = {"num-server-rounds": rounds}
TaskIdentity.task_id = TaskIdentity.run_id = 7
TaskIdentity.node_id = inner.SUPERLINK_NODE_ID
config = tomllib.load(open(place + "/pyproject.toml", "rb"))["tool"]["flwr"]["app"]["config"]
inner._run_simulation(
    clients, inner.EventType.PYTHON_API_RUN_SIMULATION_ENTER, is_app=True, app_dir=place,
    client_app_attr=name + ".client_app:app", server_app_attr=name + ".server_app:app", run=run,
    server_app_context=Context(7, 0, {}, RecordDict(), {**config, "num-server-rounds": rounds}),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
"""


def main() -> None:
    """Time everything and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=3)
    repeats = options.parse_args().repeats
    rows = []
    for name, clients, rounds in (
        ("numpyapp", 10, 3), ("legacyapp", 10, 3), ("torchapp", 4, 3), ("torchapp", 20, 20),
    ):  # fmt: skip
        ways = {"flower simulation": simulation, "atoll flower": ours}
        if name == "numpyapp":
            ways["flwr run"] = flwr_run
        times: dict[str, list[float]] = {way: [] for way in ways}
        models: dict[str, list[np.ndarray]] = {}
        for _ in range(repeats):
            for way, function in ways.items():
                seconds, models[way] = function(name, clients, rounds)
                times[way].append(seconds)
        for one, other in zip(models["flower simulation"], models["atoll flower"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        row = {"app": name, "clients": clients, "rounds": rounds}
        row |= {way: round(statistics.median(found), 2) for way, found in times.items()}
        row["ratio"] = round(row["flower simulation"] / row["atoll flower"], 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    about = {
        "date": str(date.today()), "cores": os.cpu_count(), "machine": platform.processor(),
        "flwr": metadata.version("flwr"), "ray": metadata.version("ray"), "repeats": repeats,
    }  # fmt: skip
    (HERE / "results" / "flower.json").write_text(
        json.dumps({"about": about, "seconds": rows}, indent=2) + "\n"
    )


def simulation(name: str, clients: int, rounds: int) -> tuple[float, list[np.ndarray]]:
    """Flower's simulation engine, with two actors."""
    place = str(APPS / name)
    return timed(
        [sys.executable, "-c", SIMULATION, place, name, str(clients), str(rounds)],
        {"PYTHONPATH": place},
    )


def ours(name: str, clients: int, rounds: int) -> tuple[float, list[np.ndarray]]:
    """`atoll flower`, with one process, or with two where there is work for Flower's two actors."""
    workers = ["--workers", "2"] if clients >= 20 else []
    return timed(
        [str(BIN / "atoll"), "flower", str(APPS / name), "--clients", str(clients), "--set",
         f"num-server-rounds={rounds}", *workers],
        {},
    )  # fmt: skip


def flwr_run(name: str, clients: int, rounds: int) -> tuple[float, list[np.ndarray]]:
    """`flwr run`, with the two clients that it has by default."""
    with tempfile.TemporaryDirectory() as home:
        app = Path(home) / "app"
        shutil.copytree(APPS / name, app)
        shutil.copy(HERE.parent / "LICENSE", app)
        text = (app / "pyproject.toml").read_text()
        licensed = 'license = "Apache-2.0"\nlicense-files = ["LICENSE"]'
        (app / "pyproject.toml").write_text(text.replace('license = "Apache-2.0"', licensed))
        settings = {"FLWR_HOME": f"{home}/flwr", "PATH": f"{BIN}:{os.environ['PATH']}"}
        try:
            return timed(
                [str(BIN / "flwr"), "run", str(app), "--stream", "--run-config",
                 f"num-server-rounds={rounds}"],
                settings, saves=False,
            )  # fmt: skip
        finally:
            subprocess.run(["pkill", "-f", "flower-super"], check=False)


def timed(
    command: list[str], settings: dict[str, str], *, saves: bool = True
) -> tuple[float, list[np.ndarray]]:
    """Seconds of a command, and the model that the app saved."""
    environment = {
        **os.environ, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **settings,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
        if not saves:
            return seconds, []
        with np.load(Path(place) / "final_model.npz") as arrays:
            return seconds, [arrays[name] for name in arrays]


if __name__ == "__main__":
    main()
