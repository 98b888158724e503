"""Sign-flipping attackers against a mean and a clipped mean: part of a run, and of its config."""

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import TorchLearner
from atoll.simulation import Attackers, SignFlip

learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner, algorithm=algorithms.FedAvg(weighting="uniform"), schedule=schedule
)
attackers = Attackers(SignFlip(scale=3.0), share=0.25)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
