"""An algorithm in one class: FedAvg whose clients are pulled towards small weights.

python examples/own_algorithm.py
"""

from dataclasses import dataclass

from atoll import Federation, data, schedules
from atoll.algorithms import FedAvg, LocalRule
from atoll.learners import Affine, NumpyLearner


@dataclass(frozen=True)
class WeightDecay(LocalRule):
    """Clients descend along gradient + decay * w."""

    decay: float

    needs = frozenset({"gradient"})

    def correction(self, got, mine):
        return Affine(scale=self.decay)


clients = data.load("digits").shards(clients=20, per_client=2, seed=0)
federation = Federation(
    learner=NumpyLearner(layers=(64, 32, 10), lr=0.1, batch_size=10),
    algorithm=FedAvg(local=WeightDecay(1e-3)),
    schedule=schedules.Synchronous(rounds=30, cohort=10),
)

if __name__ == "__main__":
    print(federation.simulate(clients, seed=0))
