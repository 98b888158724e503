"""FedBuff and FedAsync against synchronous FedAvg: updates and virtual time to a target accuracy.

Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS 2022, report up
to 3.3 times fewer updates than synchronous FedAvg at high concurrency. Here devices' speeds are
log-normal, the same number of clients is at work in each, and each method has its best server
learning rate of the same grid. Synchronous FedAvg waits for everyone it asked, or asks 30 % more
than it needs and takes the first ones.

python benchmarks/fedbuff.py            about two minutes on two cores
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.simulation import LogNormal, RandomDevices
from atoll.tracking.observer import Observer, RoundEnd
from atoll.tracking.record import Run

TARGET = 0.9
RATES, MIXING = (4.0, 16.0, 64.0), (0.3, 0.6, 1.0)
CLIENTS, BUDGET = 200, 16_000
RESULTS = Path(__file__).parent / "results" / "fedbuff.json"


def schedules_for(concurrency: int) -> dict[str, tuple[object, int]]:
    """Schedules with so many clients at work, and how many updates make a step of each."""
    cohort = round(concurrency / 1.3)
    return {
        "FedAvg": (
            schedules.Synchronous(rounds=BUDGET // concurrency, cohort=concurrency), concurrency,
        ),
        "FedAvg, 30 % over-selected": (
            schedules.Synchronous(rounds=BUDGET // cohort, cohort=cohort, invite=concurrency),
            cohort,
        ),
        "FedBuff, K = 10": (
            schedules.Buffered(rounds=BUDGET // 10, concurrency=concurrency, buffer=10), 10,
        ),
        "FedAsync": (
            schedules.fedasync(rounds=BUDGET, concurrency=concurrency), 1,
        ),
    }  # fmt: skip


def measure(
    schedule: object, each: int, rate: float, seed: int, sigma: float
) -> tuple[float, float, float]:
    """Updates used, updates sent and virtual seconds until the target; infinite if never."""
    population = data.load("digits").dirichlet(clients=CLIENTS, alpha=0.3, seed=seed)
    federation = Federation(
        learner=NumpyLearner(layers=(64, 10), lr=0.05, batch_size=8),
        algorithm=algorithms.FedAvg(weighting="uniform", server=algorithms.server.SGD(rate)),
        schedule=schedule,
        evaluation=Evaluation(every=max(1, 50 // each), clients_every=None),
    )
    devices = RandomDevices(steps_per_second=LogNormal(median=1.0, sigma=sigma))
    goal = Goal(each)
    with contextlib.suppress(Reached):
        federation.simulate(population, seed=seed, devices=devices, observers=[goal])
    return goal.found


class Reached(Exception):
    """The target was reached; there is no need to go on."""


class Goal(Observer):
    """Waits for the target."""

    def __init__(self, each: int) -> None:
        self.each, self.sent = each, 0
        self.found = (float("inf"),) * 3

    def round(self, run: Run, end: RoundEnd) -> None:
        self.sent += end.record.invited
        if end.record.metrics.get("accuracy", 0.0) >= TARGET:
            self.found = (end.record.round * self.each, self.sent, end.record.clock)
            raise Reached


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the log-normal speeds")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[10, 50, 150])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    for concurrency in options.concurrency:
        print(f"{concurrency} clients at work, to an accuracy of {TARGET}, medians")
        base = None
        for name, (schedule, each) in schedules_for(concurrency).items():
            rows = {}
            for rate in RATES if name != "FedAsync" else MIXING:
                runs = [
                    measure(schedule, each, rate, seed, options.sigma)
                    for seed in range(options.seeds)
                ]
                rows[rate] = [statistics.median(column) for column in zip(*runs, strict=True)]
            # Each figure at the rate that is best for it.
            rate, (used, sent, _) = min(rows.items(), key=lambda item: item[1][0])
            quickest, (_, _, seconds) = min(rows.items(), key=lambda item: item[1][2])
            base = base or (used, seconds)
            line = {
                "method": name, "concurrency": concurrency, "server_lr": rate,
                "server_lr_for_time": quickest, "updates": used,
                "sent": sent, "seconds": seconds, "fewer_updates": base[0] / used,
                "faster": base[1] / seconds,
            }  # fmt: skip
            found.append(line)
            print(
                f"  {name:27} {used:7.0f} updates ({line['fewer_updates']:.1f} x fewer) "
                f"{seconds:8.0f} s ({line['faster']:.1f} x faster), "
                f"server lr {rate:g} and {quickest:g}"
            )
    options.out.write_text(
        json.dumps(
            {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": platform.machine(),
                "target": TARGET,
                "seeds": options.seeds,
                "sigma": options.sigma,
                "data": f"1,797 digits, {CLIENTS} clients, Dirichlet 0.3",
                "rows": [
                    {
                        k: None if isinstance(v, float) and not math.isfinite(v) else v
                        for k, v in row.items()
                    }
                    for row in found
                ],
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
