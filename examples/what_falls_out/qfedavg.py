"""q-FedAvg (Li et al., ICLR 2020): clients with a greater loss weigh more."""

from dataclasses import dataclass

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.core.updates import Update
from atoll.learners import TorchLearner


@dataclass(frozen=True, kw_only=True)
class QFedAvg(algorithms.FedAvg):
    q: float = 1.0

    needs = frozenset({"outputs"})

    def work(self, client, got, mine):
        loss = client.loss(got["params"])
        local = client.train(got["params"])
        lipschitz = 1 / client.learner.lr
        change = lipschitz * (local.params - got["params"])
        square = (change**2).sum(-1)[..., None]
        h = self.q * loss ** (self.q - 1) * square + lipschitz * loss**self.q
        share = loss**self.q / h
        return Update({"delta": share * change}, weight=h, metrics={"train_loss": loss}), mine


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(learner=learner, algorithm=QFedAvg(), schedule=schedule)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
