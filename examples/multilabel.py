"""Ten clients learn which of six topics a document has; a document may have several, or none.

    python examples/multilabel.py

Needs `pip install 'torch>=2.6,<2.14' scikit-learn`.
"""

import numpy as np
from sklearn.datasets import make_multilabel_classification
from torch import nn

from atoll import Federation, algorithms, data, schedules, stopping
from atoll.learners import Metric, TorchLearner
from atoll.rounds.plan import Evaluation

words, topics = make_multilabel_classification(
    n_samples=3000, n_features=40, n_classes=6, n_labels=2, random_state=0
)
clients = data.from_arrays(np.log1p(words), topics, task="multilabel").lognormal(
    clients=10, sigma=1.0, test=0.25, seed=0
)


def first_is_right(outputs, targets):
    """In how many documents the likeliest topic is one of theirs."""
    return targets[np.arange(len(targets)), outputs.argmax(axis=1)].sum()


federation = Federation(
    learner=TorchLearner(
        nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 6)),
        loss="binary_cross_entropy",
        lr=0.5,
        batch_size=16,
        metrics={"first": Metric(first_is_right)},
    ),
    algorithm=algorithms.FedAvg(),
    schedule=schedules.Synchronous(rounds=30, cohort=5),
    evaluation=Evaluation(spread=("accuracy", "first"), best="micro_f1"),
    stop=(stopping.Patience(10, "first"),),
)

if __name__ == "__main__":
    run = federation.simulate(clients, seed=0)
    for name, value in run.metrics.items():
        print(f"{name:24} {value:.4f}")
