"""fluke in one process; `--variant` momentum or adam changes the local optimiser."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from unittest.mock import MagicMock

import numpy as np
import torch

# fluke imports torchvision for data sets and networks that are not used here, and torchvision would
# decide which torch this runs on.
for name in ("", ".datasets", ".transforms", ".models"):
    sys.modules["torchvision" + name] = MagicMock(__spec__=ModuleSpec("torchvision" + name, None))

from fluke import DDict, FlukeENV
from fluke.algorithms import CentralizedFL
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.evaluation import ClassificationEval
from fluke.server import Server
from workloads import (
    WORKLOADS,
    Data,
    Report,
    arguments,
    cohort,
    loss_of,
    make_model,
    probe_loss,
)

given = arguments()
w = WORKLOADS[given.workload]
report = Report("fluke", given, f"{version('fluke-fl')}, torch {torch.__version__}")
data = Data(given.workload)
model = make_model(given.workload)
optimizer = {"name": torch.optim.SGD, "lr": w["rate"]}
if given.variant == "momentum":
    optimizer |= {"lr": w["rate"] / 10, "momentum": 0.9}
elif given.variant == "adam":
    optimizer = {"name": torch.optim.Adam, "lr": 0.001}


class Loss(torch.nn.Module):
    def forward(self, outputs, targets):
        return loss_of(outputs, targets)


class GivenCohorts(Server):
    """Its clients are those that every contender trains."""

    def get_eligible_clients(self, eligible_perc):
        self.number = getattr(self, "number", -1) + 1
        return [self.clients[i] for i in np.sort(cohort(given.workload, self.number))]


class Timed(CentralizedFL):
    def finalize(self):
        """Leave out the evaluations after the last round."""

    def notify(self, event, **named):
        super().notify(event, **named)
        if event == "end_round":
            report.lap()


environment = FlukeENV()
environment.set_evaluator(ClassificationEval(eval_every=10**6, n_classes=w["classes"]))
environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
settings = OptimizerConfigurator(DDict(**optimizer), DDict(name="StepLR", step_size=1, gamma=1.0))
clients = [
    Client(
        index=i,
        train_set=FastDataLoader(
            *map(torch.from_numpy, data.client(i)),
            num_labels=w["classes"],
            batch_size=w["batch"],
            shuffle=True,
            skip_singleton=False,
        ),
        test_set=None,
        optimizer_cfg=settings,
        loss_fn=Loss(),
        local_epochs=w["epochs"],
        # Local optimisers begin anew in every round, as everyone's do here.
        persistency=False,
    )
    for i in range(len(data))
]
server = GivenCohorts(model, None, clients, weighted=True)
federation = Timed(len(clients), None, {}, clients=clients, server=server)
report.start()
federation.run(n_rounds=given.rounds, eligible_perc=w["cohort"] / w["clients"])
report.done(probe_loss(server.model, given.workload))
