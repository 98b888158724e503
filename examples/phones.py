"""Slow, forgetful phones: over-selection, a deadline, and partial work, in simulated time.

python examples/phones.py
"""

from dataclasses import replace

from atoll import Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.simulation import LogNormal, RandomDevices

clients = data.load("digits").lognormal(clients=200, sigma=0.5, seed=0)
devices = RandomDevices(
    steps_per_second=LogNormal(median=1.0, sigma=1.0),
    up=LogNormal(median=100_000, sigma=0.5),
    dropout=0.1,
    jitter=0.3,
)
federation = Federation(
    learner=NumpyLearner(layers=(64, 32, 10), lr=0.1, batch_size=5, epochs=3),
    algorithm=algorithms.FedAvg(weighting="work"),
    schedule=schedules.Synchronous(rounds=30, cohort=20, minimum=5),
)
ways = {
    "wait for everyone": federation.schedule,
    "invite 30, take the first 20": replace(federation.schedule, invite=30),
    "drop the slow after 3 s": replace(federation.schedule, deadline=3.0),
    "partial work within 3 s": replace(federation.schedule, deadline=3.0, adaptive=True),
}

if __name__ == "__main__":
    for name, schedule in ways.items():
        run = replace(federation, schedule=schedule).simulate(clients, devices=devices)
        print(
            f"{name:<30} accuracy {run.metrics['accuracy']:.3f} after {run.history[-1].clock:6.0f} "
            f"simulated seconds, {run.bytes_up / 1e6:.1f} MB sent"
        )
