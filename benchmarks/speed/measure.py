"""Run one contender, watch its whole process tree, and give its figures.

python benchmarks/speed/measure.py PYTHON RUNNER WORKLOAD [--rounds N] [--threads T] [...]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
LIMIT = 900.0


def measure(python: str, runner: str, arguments: list[str]) -> dict[str, Any]:
    """The runner's own figures with peak memory (summed over processes) and processor time."""
    environment = {**os.environ, "ATOLL_BENCH_LAUNCH": repr(time.time())}
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Installed packages come compiled; so is what runs from its source, after its first start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [python, str(HERE / runner), *arguments], stdout=log, stderr=subprocess.STDOUT,
            env=environment, cwd=HERE,
        )  # fmt: skip
        peak, started = 0, time.time()
        while child.poll() is None:
            peak = max(peak, _memory(child.pid))
            if time.time() - started > LIMIT:
                child.kill()
            time.sleep(0.2)
        log.seek(0)
        output = log.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [line for line in output.splitlines() if line.startswith("BENCH ")]
    if not lines:
        return {"runner": runner, "arguments": arguments, "error": output[-600:]}
    return json.loads(lines[-1][6:]) | {
        "peak_mb": round(peak / 2**20), "cpu_seconds": round(used, 2)
    }  # fmt: skip


def _memory(pid: int) -> int:
    """Resident bytes of a process tree; pages that processes share count for each of them."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
    except psutil.Error:
        return total
    return total


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3:])))
