"""FedPer (Arivazhagan et al., 2019): the head stays with each client. No line of algorithm."""

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import TorchLearner

learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner, algorithm=algorithms.FedAvg(), schedule=schedule, private=("2.*",)
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
