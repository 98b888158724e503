"""atoll on a workload. `--variant` takes an engine, a rule and a stage, separated by slashes."""

from __future__ import annotations

from workloads import WORKLOADS, Data, Report, arguments, cohort, make_model, probe_loss

given = arguments()
report = Report("atoll", given)

from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from atoll import Evaluation, Federation, algorithms, data, schedules  # noqa: E402
from atoll.aggregation import Clip, Mean  # noqa: E402
from atoll.learners import TorchLearner  # noqa: E402
from atoll.tracking import Observer  # noqa: E402

w = WORKLOADS[given.workload]


@dataclass(frozen=True)
class Given:
    """The clients that every contender trains."""

    def draw(self, roster: Any, count: int, round: int, key: Any) -> np.ndarray:
        return np.sort(cohort(given.workload, round - 1))


class Laps(Observer):
    def begin(self, run: Any) -> None:
        report.start()

    def round(self, run: Any, end: Any) -> None:
        report.lap()


engine, algorithm, pipeline, optimizer, rate = None, algorithms.FedAvg(), Mean(), None, w["rate"]
for word in filter(None, given.variant.split("/")):
    if word == "prox":
        algorithm = algorithms.FedProx(mu=0.01)
    elif word == "scaffold":
        algorithm = algorithms.Scaffold()
    elif word == "clip":
        pipeline = Clip(10.0) >> Mean()
    elif word == "momentum":
        optimizer = partial(torch.optim.SGD, momentum=0.9)
        rate /= 10
    elif word == "adam":
        optimizer, rate = torch.optim.Adam, 0.001
    else:
        engine = word

held = Data(given.workload)
task = "tokens" if held.y.ndim > 1 else "classification"
clients = data.from_columns(held.x, held.y, held.offsets, task=task, classes=w["classes"])
module = make_model(given.workload)
run = Federation(
    learner=TorchLearner(
        module, lr=rate, batch_size=w["batch"], epochs=w["epochs"], optimizer=optimizer,
        weights="given",
    ),
    algorithm=algorithm,
    pipeline=pipeline,
    schedule=schedules.Synchronous(rounds=given.rounds, cohort=w["cohort"], selection=Given()),
    evaluation=Evaluation(every=10**6, clients_every=None),
).simulate(clients, engine=engine, observers=[Laps()])  # fmt: skip
with torch.no_grad():
    flat = torch.from_numpy(run.model["params"])
    torch.nn.utils.vector_to_parameters(flat, module.parameters())
report.done(probe_loss(module, given.workload), engine=run.engine)
