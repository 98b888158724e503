"""Local optimisers are those of torch, step for step, whatever they look at."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from atoll.core.random import Key
from atoll.data.examples import Examples
from atoll.errors import ConfigurationError
from atoll.learners import TorchLearner
from atoll.learners.base import Affine, Assignment


def examples(size=12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 4)).astype("f")
    return Examples(x, (x[:, 0] > 0).astype(int))


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


class Lars(torch.optim.Optimizer):
    """You, Gitman, Ginsburg 2017: a rate for each layer, by norms of its weights and gradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                trust = p.norm() / p.grad.norm().clamp_min(1e-9)
                p.add_(p.grad * trust, alpha=-group["lr"])


def grouped(named_parameters, lr):
    """No weight decay of biases, and a tenth of the rate for the head."""
    named = list(named_parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for n, p in named if n == "0.weight"], "weight_decay": 0.5},
            {"params": [p for n, p in named if n == "2.weight"], "lr": lr / 10},
        ],
        lr=lr,
    )


class Muon(torch.optim.Optimizer):
    """torch's own for matrices, and SGD for the rest: an optimiser of optimisers."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        flat = [p for group in self.param_groups for p in group["params"]]
        self.parts = [
            torch.optim.Muon([p for p in flat if p.ndim == 2], lr=lr),
            torch.optim.SGD([p for p in flat if p.ndim != 2], lr=lr),
        ]

    def step(self, closure=None):
        for part in self.parts:
            part.step()


OPTIMIZERS = {
    "LBFGS": lambda params, lr: torch.optim.LBFGS(params, lr=lr, max_iter=4),
    "Adafactor": torch.optim.Adafactor,
    "LARS": Lars,
    "groups": grouped,
    "Muon": Muon,
    "Adam by a function": lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(0.8, 0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch(name):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    factory = OPTIMIZERS[name]
    held = examples()
    learner = TorchLearner(net(), optimizer=factory, lr=0.05, batch_size=None, epochs=3)
    start = learner.init(Key(0))
    local = learner.train(start, held, Assignment(1, Key(1)))
    module = learner.load_into(start, net())
    given = module.named_parameters() if factory is grouped else module.parameters()
    optimizer = factory(list(given), lr=0.05)
    x, y = map(torch.from_numpy, held.all())

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        optimizer.step(closure)
    wanted = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(local.params, wanted, rtol=1e-4, atol=1e-6)


def test_a_correction_is_in_what_a_closure_sees():
    """LBFGS on the loss of FedProx, written as a correction and as a loss."""
    held = examples()
    factory = OPTIMIZERS["LBFGS"]
    learner = TorchLearner(net(), optimizer=factory, lr=0.5, batch_size=None, epochs=2)
    start = learner.init(Key(0))
    centre = torch.from_numpy(start["params"])
    local = learner.train(start, held, Assignment(1, Key(1)), Affine(2.0, -2.0 * centre))
    module = learner.load_into(start, net())
    optimizer = factory(list(module.parameters()), lr=0.5)
    x, y = map(torch.from_numpy, held.all())

    def closure():
        optimizer.zero_grad()
        here = torch.cat([p.flatten() for p in module.parameters()])
        loss = F.cross_entropy(module(x), y)
        (loss + (here - centre).square().sum()).backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    wanted = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(local.params, wanted, rtol=1e-4, atol=1e-6)


def test_what_treats_numbers_alone_is_stacked_and_the_rest_is_not():
    held = examples()
    for factory, stacked in [
        (torch.optim.Adam, True),
        (OPTIMIZERS["Adam by a function"], True),
        (torch.optim.LBFGS, False),
        (torch.optim.Adafactor, False),
        (grouped, False),
    ]:
        reason = TorchLearner(net(), optimizer=factory).stacks(held)
        assert (reason == "") == stacked, reason


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (torch.optim.SparseAdam, "does not support dense gradients"),
        (getattr(torch.optim, "Muon", torch.optim.SparseAdam), "cannot train this module"),
        (lambda params, lr: None, "it gives NoneType"),
        (lambda params: torch.optim.SGD(params, 0.1), "unexpected keyword argument 'lr'"),
    ],
)
def test_what_cannot_take_a_step_is_refused_when_the_learner_is_made(factory, told):
    with pytest.raises(ConfigurationError, match=told):
        TorchLearner(net(), optimizer=factory)
