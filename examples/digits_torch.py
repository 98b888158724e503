"""A hundred clients with skewed labels train a torch model with FedProx.

    python examples/digits_torch.py

Needs `pip install 'torch>=2.6,<2.14' scikit-learn matplotlib`.
"""

from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.learners import TorchLearner
from atoll.tracking import progress

clients = data.load("digits").dirichlet(clients=100, alpha=0.3, seed=0)
federation = Federation(
    learner=TorchLearner(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        loss="cross_entropy",
        lr=0.1,
        batch_size=10,
        epochs=5,
    ),
    algorithm=algorithms.FedProx(mu=0.01),
    schedule=schedules.Synchronous(rounds=50, cohort=10),
)

if __name__ == "__main__":
    run = federation.simulate(clients, seed=0, observers=[progress()])
    print(run.history[-1].metrics["accuracy"], run.bytes_up, run.bytes_down)
    run.plot("accuracy.png")
