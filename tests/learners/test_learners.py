"""Learners against autograd, plain framework loops and closed forms."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll import data
from atoll.core.random import Key, permutations
from atoll.data import Examples
from atoll.errors import ConfigurationError, DataError
from atoll.learners import Affine, Assignment, NumpyLearner, rates
from atoll.learners.metrics import figures

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from atoll.learners import TorchLearner


def examples(n=50, features=4, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)).astype(np.float32)
    return Examples(x, rng.integers(0, classes, n))


def assignment(round=1, fraction=1.0, client="a"):
    return Assignment(round, Key(0).fold("work", round, client), fraction)


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batch_rows(key, count, size, steps):
    """The batches that the local loop draws, spelled out."""
    rows = []
    for permutation in permutations([key.fold("batches").integer()], count, steps)[0]:
        rows += [permutation[start : start + size] for start in range(0, count, size)]
    return rows[:steps]


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.sampled_from(["cross_entropy", "squared"]),
    st.integers(0, 5),
)
def test_numpy_gradients_are_autograds(layers, loss, seed):
    learner = NumpyLearner(layers=tuple(layers), loss=loss, batch_size=None)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(7, layers[0])).astype(np.float32)
    y = rng.integers(0, layers[-1], 7)
    if loss == "squared":
        y = rng.normal(size=(7, layers[-1])).astype(np.float32)
    model = learner.init(Key(seed))
    model["params"] += rng.normal(0, 0.1, learner.layout.size).astype(np.float32)
    gradient, _ = learner.gradient(model, Examples(x, y), Key(0))

    weights = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in learner.layout.unpack(model).items()
    }
    h = torch.tensor(x)
    for number in range(len(layers) - 1):
        h = h @ weights[f"{number}.weight"] + weights[f"{number}.bias"]
        h = torch.relu(h) if number < len(layers) - 2 else h
    if loss == "squared":
        (0.5 * (h - torch.tensor(y)).square().sum(1).mean()).backward()
    else:
        F.cross_entropy(h, torch.tensor(y)).backward()
    expected = np.concatenate([w.grad.numpy().ravel() for w in weights.values()])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
        torch.optim.Adam,
        partial(torch.optim.AdamW, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_local_loop_is_the_loop_people_write(optimizer, clip):
    held = examples()
    learner = TorchLearner(
        mlp(), lr=0.05, batch_size=8, epochs=2, optimizer=optimizer, max_gradient_norm=clip
    )
    model = learner.init(Key(1))
    local = learner.train(model, held, assignment())

    module = mlp()
    module.load_state_dict({n: torch.tensor(v) for n, v in learner.layout.unpack(model).items()})
    make = optimizer or torch.optim.SGD
    plain = make(module.parameters(), lr=0.05)
    for rows in batch_rows(assignment().key, 50, 8, 14):
        plain.zero_grad()
        F.cross_entropy(module(torch.tensor(held.x[rows])), torch.tensor(held.y[rows])).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        plain.step()
    expected = torch.cat([p.detach().ravel() for p in module.parameters()])
    np.testing.assert_allclose(local.params.numpy(), expected.numpy(), rtol=2e-4, atol=2e-6)
    assert (local.steps, local.seen, local.examples) == (14, 100, 50)
    assert local.path == pytest.approx(14 * 0.05)


def test_numpy_momentum_is_torchs():
    held = examples()
    learner = NumpyLearner(layers=(4, 3), lr=0.05, batch_size=8, epochs=3, momentum=0.9)
    model = learner.init(Key(1))
    local = learner.train(model, held, assignment())
    weights = learner.layout.unpack({"params": torch.tensor(model["params"])})
    parameters = [nn.Parameter(w.clone()) for w in weights.values()]
    plain = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for rows in batch_rows(assignment().key, 50, 8, 21):
        plain.zero_grad()
        logits = torch.tensor(held.x[rows]) @ parameters[0] + parameters[1]
        F.cross_entropy(logits, torch.tensor(held.y[rows])).backward()
        plain.step()
    expected = torch.cat([p.detach().ravel() for p in parameters])
    np.testing.assert_allclose(local.params, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_affine_correction_is_the_function_it_stands_for(kind):
    if kind == "numpy":
        learner = NumpyLearner(layers=(4, 3), lr=0.1, batch_size=8)
    else:
        learner = TorchLearner(mlp(), lr=0.1, batch_size=8)
    model = learner.init(Key(0))
    constant = learner.asarray(np.linspace(-1, 1, learner.layout.size).astype(np.float32))
    affine = learner.train(model, examples(), assignment(), Affine(0.5, constant))
    function = learner.train(
        model, examples(), assignment(), lambda gradient, params: gradient + 0.5 * params + constant
    )
    np.testing.assert_allclose(
        learner.asnumpy(affine.params), learner.asnumpy(function.params), rtol=1e-5, atol=1e-6
    )


def test_linear_regression_reaches_the_normal_equations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    y = (x @ [1.0, -2.0, 0.5] + 3 + rng.normal(0, 0.1, 200)).astype(np.float32)
    learner = NumpyLearner(layers=(3, 1), loss="squared", lr=0.3, batch_size=None, steps=200)
    local = learner.train(learner.init(Key(0)), Examples(x, y), assignment())
    expected, *_ = np.linalg.lstsq(np.c_[x, np.ones(200)], y, rcond=None)
    np.testing.assert_allclose(local.params, expected, atol=1e-4)
    sums = learner.evaluate({"params": local.params}, Examples(x, y), "regression", None)
    residual = y - np.c_[x, np.ones(200)] @ expected
    assert figures(sums, "regression")["rmse"] == pytest.approx(residual.std(), rel=1e-3)


def test_training_leaves_the_given_model_alone():
    learner = TorchLearner(mlp(), lr=0.5)
    model = learner.init(Key(0))
    before = model["params"].copy()
    learner.train(model, examples(), assignment())
    np.testing.assert_array_equal(model["params"], before)


def test_dropout_draws_belong_to_the_client_and_the_round():
    module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    learner = TorchLearner(module, lr=0.1)
    model = learner.init(Key(0))

    def trained(round, client):
        return learner.train(model, examples(), assignment(round, client=client)).params.numpy()

    one = trained(1, "a")
    torch.rand(17)
    trained(1, "b")
    np.testing.assert_array_equal(trained(1, "a"), one)
    assert np.abs(trained(1, "b") - one).max() > 0
    assert np.abs(trained(2, "a") - one).max() > 0


def test_the_callers_random_stream_is_untouched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    learner = TorchLearner(mlp())
    torch.manual_seed(5)
    learner.train(learner.init(Key(0)), examples(), assignment())
    torch.testing.assert_close(torch.rand(3), expected)


def test_initial_weights_come_from_the_seed_unless_they_are_given():
    seeded = [TorchLearner(mlp()).init(Key(0))["params"] for _ in range(2)]
    np.testing.assert_array_equal(*seeded)
    assert np.abs(TorchLearner(mlp()).init(Key(1))["params"] - seeded[0]).max() > 0
    module = mlp()
    given = TorchLearner(module, weights="given").init(Key(0))["params"]
    np.testing.assert_array_equal(
        given, torch.cat([p.detach().ravel() for p in module.parameters()]).numpy()
    )


def test_pretrained_looking_modules_must_say_which_weights():
    with pytest.raises(ConfigurationError, match="weights='given'"):
        TorchLearner(mlp().eval())
    TorchLearner(mlp().eval(), weights="given")


def test_parameters_that_cannot_be_redrawn_are_refused_by_name():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.gain * x

    with pytest.raises(ConfigurationError, match="'1.gain' cannot be drawn from the seed"):
        TorchLearner(nn.Sequential(nn.Linear(4, 3), Scale()))


def test_frozen_parameters_stay_and_do_not_travel():
    module = mlp()
    module[0].requires_grad_(False)
    learner = TorchLearner(module, weights="given", lr=0.5)
    assert learner.layout.size == 8 * 3 + 3
    learner.train(learner.init(Key(0)), examples(), assignment())
    torch.testing.assert_close(learner._resident.module[0].weight, module[0].weight)


def test_tied_parameters_travel_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    module[1].weight = module[0].weight
    learner = TorchLearner(module, lr=0.1)
    assert learner.layout.size == 16 + 4 + 4 + 15
    learner.train(learner.init(Key(0)), examples(), assignment())
    resident = learner._resident.module
    assert resident[0].weight.data_ptr() == resident[1].weight.data_ptr()


def test_next_token_models_learn_and_report_perplexity():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.rnn = nn.LSTM(8, 16, batch_first=True)
            self.out = nn.Linear(16, 5)

        def forward(self, tokens):
            return self.out(self.rnn(self.embed(tokens))[0])

    text = np.arange(2000) % 5
    windows = np.lib.stride_tricks.sliding_window_view(text, 11)[::10].copy()
    held = Examples(windows[:, :-1], windows[:, 1:].copy())
    learner = TorchLearner(Model(), lr=1.0, batch_size=10, epochs=8)
    local = learner.train(learner.init(Key(0)), held, assignment())
    model = {"params": local.params.numpy()}
    after = figures(learner.evaluate(model, held, "tokens", 5), "tokens")
    before = figures(learner.evaluate(learner.init(Key(0)), held, "tokens", 5), "tokens")
    assert before["perplexity"] == pytest.approx(5, rel=0.2)
    assert after["perplexity"] < 1.5
    assert after["accuracy"] > 0.95


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_torch_regression(loss):
    held = Examples(np.eye(4, dtype=np.float32), np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    learner = TorchLearner(nn.Linear(4, 1), loss=loss, lr=0.1, batch_size=None, steps=3)
    model = learner.init(Key(0))
    sums = learner.evaluate(model, held, "regression", None)
    outputs = F.linear(
        torch.eye(4), *(torch.tensor(v) for v in learner.layout.unpack(model).values())
    )
    expected = getattr(F, f"{loss}_loss")(outputs[:, 0], torch.tensor(held.y))
    assert figures(sums, "regression")["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_binary_cross_entropy_with_one_logit():
    held = examples(classes=2)
    learner = TorchLearner(nn.Linear(4, 1), loss="binary_cross_entropy", lr=0.1)
    sums = learner.evaluate(learner.init(Key(0)), held, "classification", 2)
    assert set(figures(sums, "classification")) == {"loss", "accuracy", "macro_f1", "auc"}
    clients = data.from_arrays(held.x, held.y, classes=2).iid(clients=2)
    learner.check(clients)
    squeezed = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    TorchLearner(squeezed, loss="binary_cross_entropy", lr=0.1).check(clients)
    with pytest.raises(DataError, match="does not fit"):
        TorchLearner(nn.Linear(4, 2), loss="binary_cross_entropy", lr=0.1).check(clients)


def test_rates():
    assert rates.Exponential(1.0, 0.5)(3) == 0.25
    assert rates.Cosine(1.0, 10)(6) == pytest.approx(0.5)
    assert rates.Cosine(1.0, 10, final=0.1)(11) == pytest.approx(0.1)
    assert rates.Warmup(0.4, 4)(1) == pytest.approx(0.1)
    learner = NumpyLearner(layers=(4, 3), lr=rates.Exponential(0.2, 0.5), batch_size=None)
    local = learner.train(learner.init(Key(0)), examples(), assignment(round=2))
    assert local.path == pytest.approx(0.1)


def test_partial_work_is_counted():
    learner = NumpyLearner(layers=(4, 3), batch_size=10, epochs=4)
    local = learner.train(learner.init(Key(0)), examples(), assignment(fraction=0.25))
    assert (local.steps, local.seen) == (5, 50)
    tiny = learner.train(learner.init(Key(0)), examples(), assignment(fraction=0.001))
    assert tiny.steps == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NumpyLearner(layers=(4,)), "two or more"),
        (lambda: NumpyLearner(layers=(4, 3), lr=0.0), "lr must be positive"),
        (lambda: NumpyLearner(layers=(4, 3), batch_size=0), "batch_size must be"),
        (lambda: NumpyLearner(layers=(4, 3), epochs=1.5), "epochs must be"),
        (lambda: TorchLearner(mlp(), loss="hinge"), "loss 'hinge' is not known"),
        (lambda: TorchLearner("mlp"), "must be a torch.nn.Module"),
    ],
)
def test_bad_settings_get_a_sentence(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_misfits_are_said_before_training():
    four = data.from_arrays(examples().x, examples().y, classes=3, name="four").iid(clients=2)
    with pytest.raises(
        DataError, match="inputs of four have 4 values, but the first layer takes 5"
    ):
        NumpyLearner(layers=(5, 3)).check(four)
    with pytest.raises(DataError, match="3 classes, but the model gives 2 outputs"):
        NumpyLearner(layers=(4, 2)).check(four)
    with pytest.raises(DataError, match="the module does not fit four"):
        TorchLearner(nn.Linear(5, 3)).check(four)
    with pytest.raises(DataError, match="3 classes, but the model gives 7 outputs"):
        TorchLearner(nn.Linear(4, 7)).check(four)
    with pytest.raises(DataError, match="loss 'mse' does not fit"):
        TorchLearner(nn.Linear(4, 1), loss="mse").check(four)
