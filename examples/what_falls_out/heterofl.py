"""HeteroFL (Diao et al., ICLR 2021): small clients train, and send, half of the hidden units."""

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Spec
from atoll.learners import TorchLearner

UNITS, SMALL = np.arange(16), 8


def inner(layout):
    """Which parameters belong to the first half of the hidden units, or to the outputs alone."""
    keep = {"0.weight": UNITS[:, None] < SMALL, "0.bias": UNITS < SMALL}
    keep |= {"2.weight": UNITS[None, :] < SMALL, "2.bias": np.True_}
    parts = [np.broadcast_to(keep[e.name], e.shape).reshape(-1) for e in layout.entries]
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class HeteroFL(algorithms.FedAvg):
    needs = frozenset({"gradient"})

    def reports(self, shared):
        small = int(inner(shared).sum())
        return {"inner": small, "outer": Spec((shared.size - small,), optional=True)}

    def work(self, client, got, mine):
        ring = inner(client.learner.layout)
        large = client.each(lambda holder: [float(int(holder.name) % 2)])  # by its device, say
        mask = large + (1 - large) * client.learner.asarray(ring.astype(np.float32))
        start = got["params"] * mask
        local = client.train(start, lambda gradient, params: gradient * mask)
        change = local.params - start
        update = self.report(local, inner=change[..., ring], outer=change[..., ~ring])
        return replace(update, shares={"outer": large}), mine

    def step(self, state, mean, server):
        change, ring = np.zeros_like(state["params"]), inner(server.learner.layout)
        change[ring], change[~ring] = mean["inner"], mean["outer"]
        return {"params": state["params"] + change}


learner = TorchLearner(
    nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=0.1, batch_size=16
)
schedule = schedules.Synchronous(rounds=3)
federation = Federation(learner=learner, algorithm=HeteroFL(), schedule=schedule)


def clients():
    return data.load("digits").dirichlet(clients=8, alpha=0.5, seed=0)
