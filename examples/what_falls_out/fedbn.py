"""FedBN (Li et al., ICLR 2021): normalisation stays with each client, its statistics too."""

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import TorchLearner

learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)),
    lr=0.1,
    batch_size=16,
)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=3),
    private=("1.*",),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
