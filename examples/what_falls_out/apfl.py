"""APFL (Deng et al., 2020): a mixture of an own and the shared model, trained on one batch."""

from dataclasses import dataclass

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import At, TorchLearner


@dataclass(frozen=True)
class Mixture(algorithms.LocalRule):
    alpha: float = 0.5

    needs = frozenset({"gradient", "at"})
    passes = 2.0

    def remember(self, got, shared):
        return {"own": got["params"]}

    def work(self, client, got, mine):
        a, lr, own = self.alpha, client.learner.lr, [mine["own"]]

        def rule(gradient, w, at):
            own[0] = own[0] - lr * a * at(a * own[0] + (1 - a) * w)
            return gradient

        local = client.train(got["params"], At(rule))
        return local, {"delta": local.params - got["params"]}, {"own": own[0]}

    def own(self, client, got, mine):
        return self.alpha * mine["own"] + (1 - self.alpha) * got["params"]


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(
    learner=learner, algorithm=algorithms.FedAvg(local=Mixture()), schedule=schedule
)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
