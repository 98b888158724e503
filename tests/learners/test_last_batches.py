"""Every batch that will come is tried before training, and the last one may be left out."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from atoll import data
from atoll.core.random import Key
from atoll.data.examples import Examples
from atoll.errors import DataError
from atoll.learners import NumpyLearner, TorchLearner
from atoll.learners.base import Assignment


def clients(*sizes):
    rng = np.random.default_rng(0)
    held = {
        f"c{n}": (rng.normal(size=(size, 6)).astype("f"), np.arange(size) % 2)
        for n, size in enumerate(sizes)
    }
    return data.from_clients(held, test=0)


class Squeezes(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(x).squeeze()


class Fixed(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size, self.body, self.out = size, nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        begin = (torch.zeros(1, self.size, 8), torch.zeros(1, self.size, 8))
        return self.out(self.body(x.unsqueeze(-1), begin)[0][:, -1])


@pytest.mark.parametrize("module", [Squeezes(), Fixed(4)], ids=["squeeze", "state"])
def test_a_module_that_fails_on_the_last_batch_is_refused(module):
    with pytest.raises(DataError, match="1 of batch_size=4 examples.*drop_last=True"):
        TorchLearner(module, batch_size=4).check(clients(8, 13))
    TorchLearner(module, batch_size=4).check(clients(8, 12))
    TorchLearner(module, batch_size=4, drop_last=True).check(clients(8, 13))
    with pytest.raises(DataError, match="1 of batch_size=4"):
        TorchLearner(module, batch_size=4, drop_last=True).check(clients(8, 1))


@pytest.mark.parametrize(
    "learner",
    [
        NumpyLearner(layers=(6, 2), batch_size=4, drop_last=True, epochs=2),
        TorchLearner(nn.Linear(6, 2), batch_size=4, drop_last=True, epochs=2),
    ],
    ids=["numpy", "torch"],
)
@pytest.mark.parametrize(("size", "steps", "seen"), [(3, 2, 6), (4, 2, 8), (11, 4, 16)])
def test_drop_last_leaves_out_the_shorter_batch(learner, size, steps, seen):
    held = clients(size).train(0)
    local = learner.train(learner.init(Key(0)), Examples(*held.all()), Assignment(1, Key(1)))
    assert (local.steps, local.seen) == (steps, seen)
    assert learner.planned_steps(size) == steps
