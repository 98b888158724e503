"""FedRep (Collins et al., ICML 2021): train the own head, then the shared body."""

from dataclasses import dataclass

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import TorchLearner


@dataclass(frozen=True)
class HeadThenBody(algorithms.LocalRule):
    needs = frozenset({"gradient"})
    passes = 2.0

    def work(self, client, got, mine):
        client.train(got["params"], only="private")
        local = client.train(got["params"], only="shared")
        return local, {"delta": local.params - got["params"]}, mine


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner,
    algorithm=algorithms.FedAvg(local=HeadThenBody()),
    schedule=schedule,
    private=("2.*",),
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
