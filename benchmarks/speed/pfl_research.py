"""pfl-research in one process; `--variant` momentum or adam changes the local optimiser."""

from __future__ import annotations

import types
from functools import partial
from importlib.metadata import version

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import to_tensor
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from workloads import (
    TOKENS,
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
report = Report("pfl-research", given, version("pfl"))
data = Data(given.workload)
users = {i: tuple(map(to_tensor, data.client(i))) for i in range(len(data))}
order = iter([int(i) for r in range(given.rounds) for i in cohort(given.workload, r)])
federated = FederatedDataset.from_slices(users, lambda: next(order))
net = make_model(given.workload)
rate, local = w["rate"], torch.optim.SGD
if given.variant == "momentum":
    rate, local = rate / 10, partial(torch.optim.SGD, momentum=0.9)
elif given.variant == "adam":
    rate, local = 0.001, torch.optim.Adam


def inputs_of(x):
    """Tokens as whole numbers again, which pfl has made floats."""
    return x.long() if given.workload in TOKENS else x


def loss(self, x, y, eval=False):
    self.eval() if eval else self.train()
    return loss_of(self(inputs_of(x)), y.long())


@torch.no_grad()
def metrics(self, x, y, eval=True):
    return {"loss": Weighted(float(loss_of(self(inputs_of(x)), y.long())) * len(y), len(y))}


net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
model = PyTorchModel(
    model=net,
    local_optimizer_create=local,
    central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
)


class Timer(TrainingProcessCallback):
    def on_train_begin(self, *, model):
        report.start()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        report.lap()
        return False, Metrics()


FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=given.rounds, evaluation_frequency=10**6,
        train_cohort_size=w["cohort"], val_cohort_size=0,
    ),
    backend=SimulatedBackend(
        training_data=federated, val_data=None, postprocessors=[WeightByDatapoints()]
    ),
    model=model,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=w["epochs"], local_learning_rate=rate, local_batch_size=w["batch"]
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[Timer()],
)  # fmt: skip
report.done(probe_loss(net, given.workload))
