"""The speed suite: atoll, plain loops and rivals on the same work, side by side, in one table.

    python benchmarks/speed/run.py --rival flower=~/venvs/flower --rival pfl=~/venvs/pfl \
        --rival fedjax=~/venvs/fedjax --rival fluke=~/venvs/fluke

A rival is left out, and that is said, where no environment of its own is given (pip install
'flwr[simulation]==1.41.0', 'pfl[pytorch]==0.6.0', 'fluke-fl==0.8.1', each with torch, or
'fedjax==0.0.17'). Contenders take
turns in each of several passes, so that a slow minute of the machine hits all of them: in the first
at each thread setting, then at their best, of which the table has the median. Losses after
training must agree, or the row says that they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from measure import measure
from workloads import DATA, WORKLOADS, generate, make_model

RESULTS = Path(__file__).parent.parent / "results"
#: How far losses after training may lie apart: orders of examples differ.
AGREE = 0.06
#: Of each workload, GFLOP in a round (forward and backward products, no first input gradient).
GFLOP = {"W1": 83.8, "W2": 26.4, "W3": 0.157, "W4": 252.7, "W5": 152.6, "W6": 18.5}
#: What `--rival` calls them -> name, runner, and whether it is told how many threads to use.
RIVALS = {
    "pfl": ("pfl-research", "pfl_research.py", True),
    "fluke": ("fluke", "fluke_runner.py", True),
    "fedjax": ("FedJAX", "fedjax_runner.py", False),
    "flower": ("Flower", "flower.py", False),
}
JAX_WORKLOADS = ("W1", "W2", "W3", "W4")
OVERHEADS = ("", "prox", "scaffold", "momentum", "clip", "adam")


def contenders(given: argparse.Namespace, workload: str) -> list[tuple[str, str, str, list[str]]]:
    """(name, python, runner, arguments) of everyone who can run a workload."""
    here = sys.executable
    found = [("atoll", here, "ours.py", []), ("atoll", here, "ours.py", ["--variant", "auto"])]
    for name, runner in (("tight loop", "tight.py"), ("tutorial loop", "naive.py")):
        found += [(name, here, runner, ["--threads", threads]) for threads in ("1", "2")]
    for rival, python in interpreters(given).items():
        name, runner, threaded = RIVALS[rival]
        if rival == "fedjax" and workload not in JAX_WORKLOADS:
            continue
        settings = [["--threads", each] for each in ("1", "2")] if threaded else [[]]
        found += [(name, python, runner, setting) for setting in settings]
    return found


def interpreters(given: argparse.Namespace) -> dict[str, str]:
    """Python of each rival that has an environment, in the order of `RIVALS`."""
    named = dict(pair.split("=", 1) for pair in given.rival)
    return {
        rival: str(Path(named[rival]).expanduser() / "bin" / "python")
        for rival in RIVALS
        if rival in named
    }


def side_by_side(given: argparse.Namespace, workload: str) -> list[dict[str, Any]]:
    """Every contender's passes over one workload."""
    runs: list[dict[str, Any]] = []
    chosen = contenders(given, workload)
    for number in range(given.passes):
        for name, python, runner, more in chosen:
            few = ["--rounds", "5"] if name == "Flower" else []
            figures = measure(python, runner, [workload, *more, *few])
            runs.append({"contender": name, **figures, "pass": number, "arguments": more})
            print(f"  {name:<14} {' '.join(more):<18} {_said(figures)}", flush=True)
        # From now on each in its best setting; Flower's distance is far beyond its spread.
        chosen = [
            one for one in chosen if one[0] != "Flower" and one[3] == _best(runs, one[0], one[3])
        ]
    return runs


def _best(runs: list[dict[str, Any]], name: str, otherwise: list[str]) -> list[str]:
    """The arguments with which a contender was fastest."""
    own = [run for run in runs if run["contender"] == name and "seconds" in run]
    return min(own, key=lambda run: run["seconds"])["arguments"] if own else otherwise


def overheads(given: argparse.Namespace, workload: str) -> list[dict[str, Any]]:
    """What other rules cost on top of federated averaging: of rivals, momentum and Adam.

    Everyone has the number of threads with which the tight loop is fastest.
    """
    runs = []
    for number in range(given.passes):
        for variant in OVERHEADS:
            chosen = [("atoll", sys.executable, "ours.py", [])]
            threads = "2" if workload == "W1" else "1"
            chosen.append(("tight loop", sys.executable, "tight.py", ["--threads", threads]))
            if variant in ("", "momentum", "adam"):
                for rival, python in interpreters(given).items():
                    name, runner, threaded = RIVALS[rival]
                    if rival != "flower":
                        more = ["--threads", threads] if threaded else []
                        chosen.append((name, python, runner, more))
            for name, python, runner, more in chosen:
                figures = measure(python, runner, [workload, *more, "--variant", variant])
                runs.append({"contender": name, **figures, "variant": variant, "pass": number})
                print(f"  {name:<14} {variant or 'FedAvg':<10} {_said(figures)}", flush=True)
    return runs


def peak() -> dict[str, float]:
    """GFLOP/s of a large product, for one thread and for all: what the machine can do."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    rates = {}
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        times = []
        for _ in range(30):
            started = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
            times.append(time.perf_counter() - started)
        rates[str(threads)] = round(2 * 1024**3 / min(times) / 1e9, 1)
    return rates


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        pairs = (line.split(": ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {pair[0].strip(): pair[1] for pair in pairs if len(pair) == 2}
        model = f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    except (OSError, KeyError):
        pass
    return {
        "date": date.today().isoformat(), "processor": model, "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "peak_gflops": peak(),
    }  # fmt: skip


def table(runs: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    """One workload as lines of a Markdown table."""
    workload = next(run["workload"] for run in runs if "workload" in run)
    settings: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        if "seconds" in run:
            alike = settings.setdefault(run["contender"], {})
            alike.setdefault(str(run["arguments"]), []).append(run)
    best: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    for name, groups in settings.items():
        # The one that was run in every pass: a lucky single run of another is no better.
        chosen = max(groups.values(), key=lambda group: (len(group), -_median(group)))
        best[name] = _median(chosen), chosen
    ours, loop = best["atoll"][0], best["tight loop"][0]
    reference = best["tight loop"][1][0]["loss_after"]
    lines = [
        f"| {workload} | s per round | atoll / it | it / tight loop | to the end of round 1, s | "
        "peak MB | of the peak | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (seconds, alike) in sorted(best.items(), key=lambda item: item[1][0]):
        first = statistics.median(r["start_to_round_one"] for r in alike)
        memory = max(r["peak_mb"] for r in alike)
        share = f"{GFLOP[workload] / seconds / max(rates.values()):.0%}"
        same = alike[0]["rounds"] == best["tight loop"][1][0]["rounds"]
        differs = same and abs(alike[0]["loss_after"] - reference) > AGREE * max(reference, 1.0)
        loss = f"{alike[0]['loss_after']:.3f}" + (" (differs)" if differs else "")
        loss += "" if same else f" after {alike[0]['rounds']}"
        lines.append(
            f"| {name} | {seconds:.4g} | {ours / seconds:.2f} | {seconds / loop:.2f} | {first:.1f} "
            f"| {memory} | {share} | {loss} |"
        )
    return lines


def _median(group: list[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in group)


def _said(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return "failed: " + figures["error"].strip().splitlines()[-1][:90]
    return (
        f"{figures['seconds']:.4f} s a round, {figures['start_to_round_one']:.1f} s to the end of "
        f"round 1, {figures['peak_mb']} MB, loss {figures['loss_after']:.3f}"
    )


def prepare(workloads: list[str]) -> None:
    """Write what is not there yet: data, and initial weights for those without torch."""
    for name in workloads:
        if not (DATA / name / "offsets.npy").exists():
            print("writing the data of", name, flush=True)
            generate(name)
        weights = [p.detach().numpy() for p in make_model(name).parameters()]
        np.savez(DATA / name / "init.npz", *weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), default=[])
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=VENV")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--overheads", action="store_true", help="measure other rules on W1 and W2")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    workloads = given.workload or (["W1", "W2"] if given.overheads else list(WORKLOADS))
    prepare(workloads)
    absent = sorted(set(RIVALS) - set(interpreters(given)))
    if absent:
        print("left out, for want of an environment:", ", ".join(absent), flush=True)
    about = machine()
    print(json.dumps(about), flush=True)
    kind = "overheads" if given.overheads else "speed"
    out = given.out or RESULTS / f"{kind}.json"
    runs: dict[str, list[dict[str, Any]]] = {}
    for workload in workloads:
        print(workload, flush=True)
        runs[workload] = (overheads if given.overheads else side_by_side)(given, workload)
        # Neighbours on the machine take their share at times; the peak is the most that was seen.
        again = peak()
        about["peak_gflops"] = {n: max(r, again[n]) for n, r in about["peak_gflops"].items()}
        # What was measured of other workloads before stays: a suite may be run in parts.
        known = json.loads(out.read_text())["runs"] if out.exists() else {}
        out.write_text(json.dumps({"machine": about, "runs": known | runs}, indent=1) + "\n")
    if not given.overheads:
        for workload in workloads:
            print("\n".join(["", *table(runs[workload], about["peak_gflops"])]))


if __name__ == "__main__":
    main()
