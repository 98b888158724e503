"""Weights that people gave are never thrown away in silence, and what is frozen stays as it is."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key
from atoll.errors import ConfigurationError
from atoll.learners import TorchLearner


def net():
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 2)
    )


def trained(module, steps=3, rate=0.1):
    optimizer = torch.optim.SGD(module.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(20, 6)).square().sum().backward()
        optimizer.step()
    return module


def loaded():
    module = net()
    module.load_state_dict(trained(net()).state_dict())
    return module


class Own(nn.Module):
    """An initialisation of its own, as torchvision's models have."""

    def __init__(self, write):
        super().__init__()
        self.out = nn.Linear(6, 2)
        write(self.out)

    def forward(self, x):
        return self.out(x)


def counted():
    module = net()
    module(torch.randn(4, 6))
    return module


GIVEN = {
    "loaded": loaded,
    "loaded, copied": lambda: copy.deepcopy(loaded()),
    "trained": lambda: trained(net()),
    "trained, through a file": lambda: torch_file(trained(net(), 30)),
    "zeros": lambda: Own(lambda out: nn.init.zeros_(out.weight)),
    "a constant": lambda: Own(lambda out: nn.init.constant_(out.bias, 3.0)),
    "through .data": lambda: copied_in(64),
    "applied": lambda: net().apply(
        lambda part: nn.init.xavier_normal_(part.weight) if isinstance(part, nn.Linear) else None
    ),
    "counters": counted,
    "eval": lambda: net().eval(),
}


def torch_file(module):
    import io

    kept = io.BytesIO()
    torch.save(module, kept)
    kept.seek(0)
    return torch.load(kept, weights_only=False)


def copied_in(width):
    """Written where torch does not count it, as old code does."""
    module = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 2))
    module[0].weight.data.normal_(0, 1)
    return module


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
def test_weights_that_layers_do_not_draw_are_asked_about(make):
    torch.manual_seed(0)
    module = make()
    with pytest.raises(ConfigurationError, match="weights='given'"):
        TorchLearner(module)
    learner = TorchLearner(module, weights="given")
    start = learner.layout.unpack(learner.init(Key(5)))
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(start[name], parameter.detach().numpy())
    TorchLearner(module, weights="seeded").init(Key(5))


class Reset(nn.Module):
    """An initialisation of its own that the seed can draw."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 2)
        self.reset_parameters()

    def reset_parameters(self):
        self.out.reset_parameters()
        nn.init.constant_(self.out.bias, 3.0)

    def forward(self, x):
        return self.out(x)


def tied():
    module = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    module[1].weight = module[0].weight
    return module


FRESH = {
    "net": net,
    "copied": lambda: copy.deepcopy(net()),
    "through a file": lambda: torch_file(net()),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Flatten()),
    "recurrent": lambda: nn.Sequential(nn.Embedding(300, 40), nn.LSTM(40, 40)),
    "attention": lambda: nn.TransformerEncoderLayer(32, 4),
    "moved": lambda: net().to(torch.float64).float(),
    "one layer": lambda: nn.Linear(3, 2),
    "tied": tied,
}


@pytest.mark.parametrize("make", FRESH.values(), ids=FRESH)
def test_fresh_modules_are_drawn_from_the_seed_without_a_question(make):
    for seed in range(40):
        torch.manual_seed(seed)
        TorchLearner(make())


def test_the_outer_layer_has_the_last_word_as_in_its_constructor():
    learner = TorchLearner(Reset(), weights="seeded")
    start = learner.layout.unpack(learner.init(Key(1)))
    np.testing.assert_array_equal(start["out.bias"], [3.0, 3.0])
    attention = TorchLearner(nn.MultiheadAttention(8, 2), weights="seeded")
    start = attention.layout.unpack(attention.init(Key(1)))
    np.testing.assert_array_equal(start["out_proj.bias"], np.zeros(8))


def backbone():
    """A trained body whose weights are frozen, and a new head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    for _ in range(5):
        body(3 + torch.randn(50, 6))
    body.requires_grad_(False)
    return nn.Sequential(body, nn.Linear(8, 2))


def clients():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)).astype("f")
    return data.from_arrays(x, (x[:, 0] > 0).astype(int)).iid(clients=3)


def simulated(learner, **settings):
    return Federation(
        learner=learner, algorithm=algorithms.FedAvg(), schedule=schedules.Synchronous(rounds=3)
    ).simulate(clients(), **settings)


@pytest.mark.parametrize("whole", [False, True], ids=["part in eval", "all in eval"])
@pytest.mark.parametrize("weights", ["seeded", "given"])
def test_statistics_of_a_frozen_part_in_eval_mode_do_not_move(weights, whole):
    module = backbone()
    (module if whole else module[0]).eval()
    mean, bias = module[0][1].running_mean.numpy().copy(), module[0][0].bias.numpy().copy()
    assert abs(mean).max() > 0.1
    learner = TorchLearner(module, weights=weights, lr=0.1)
    run = simulated(learner)
    arrays = learner.layout.unpack(run.model)
    np.testing.assert_array_equal(arrays["0.1.running_mean"], mean)
    assert int(arrays["0.1.num_batches_tracked"]) == 5
    np.testing.assert_array_equal(learner._resident.module[0][0].bias.numpy(), bias)


def test_statistics_of_a_frozen_part_are_not_reset_and_move_in_training_mode():
    module = backbone()
    mean = module[0][1].running_mean.numpy().copy()
    learner = TorchLearner(module, weights="seeded", lr=0.1)
    start = learner.layout.unpack(learner.init(Key(0)))
    np.testing.assert_array_equal(start["0.1.running_mean"], mean)
    arrays = learner.layout.unpack(simulated(learner).model)
    assert abs(arrays["0.1.running_mean"] - mean).max() > 1e-3


def test_dropout_in_eval_mode_stays_there():
    class Told(nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x

    modes = []
    module = nn.Sequential(nn.Linear(6, 4), Told(), nn.Linear(4, 2))
    module[1].eval()
    learner = TorchLearner(module, lr=0.1)
    simulated(learner, engine="sequential")
    assert modes
    assert not any(modes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Keras itself
def test_keras_asks_too():
    pytest.importorskip("keras")
    import keras

    from atoll.learners import KerasLearner

    if keras.backend.backend() not in ("jax", "torch"):
        pytest.skip("Keras runs on another backend here")

    def model():
        made = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(2)])
        made.build((None, 6))
        return made

    KerasLearner(model())
    moved = model()
    moved.set_weights([weight + 0.25 for weight in moved.get_weights()])
    with pytest.raises(ConfigurationError, match="weights='given'"):
        KerasLearner(moved)
    learner = KerasLearner(moved, weights="given")
    start = learner.layout.unpack(learner.init(Key(0)))
    (bias,) = [value for name, value in start.items() if name.endswith("0/bias")]
    np.testing.assert_array_equal(bias, moved.get_weights()[1])
    KerasLearner(moved, weights="seeded")
