"""Weights from people's own objects and back into them; outputs and losses as their owners'."""

import copy
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

from atoll.core.random import Key
from atoll.data import Examples
from atoll.errors import ConfigurationError
from atoll.learners import NumpyLearner, TorchLearner

CLASSES, WIDTH = 3, 5


def columns(size=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, WIDTH), dtype=np.float32)
    return x, rng.integers(0, CLASSES, size)


def same(one, other):
    assert set(one) == set(other)
    for section, vector in one.items():
        np.testing.assert_array_equal(vector, other[section])


def network():
    """Layers with statistics, of which the first is frozen."""
    module = nn.Sequential(
        nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, CLASSES)
    )
    module[0].requires_grad_(False)
    with torch.no_grad():
        module(torch.randn(20, WIDTH))
    return module


def learner_of(module, **settings):
    return TorchLearner(module, lr=0.1, batch_size=8, weights="given", **settings)


def test_torch_modules_come_and_go():
    module = network()
    learner = learner_of(module)
    model = learner.vectors_of(module)
    same(model, learner.init(Key(0)))
    same(model, learner.vectors_of(module.state_dict()))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    same(model, learner.vectors_of(state))
    trained = {name: state[name] for name in state if not name.startswith("0.")}
    same(model, learner.vectors_of(trained))
    same(model, learner.vectors_of(model))

    target = copy.deepcopy(module)
    moved = {"params": model["params"] + 1, "buffers": model["buffers"] + 1,
             "counters": model["counters"] + 1}  # fmt: skip
    assert learner.load_into(moved, target) is target
    same(moved, learner.vectors_of(target))
    assert torch.equal(target[0].weight, module[0].weight)
    assert target[1].num_batches_tracked == module[1].num_batches_tracked + 1


@pytest.mark.parametrize("double", [False, True])
def test_torch_outputs_are_the_modules(double):
    module = network()
    learner = learner_of(module)
    x, y = columns()
    examples = Examples(np.concatenate([x, x]), np.concatenate([y, y]), np.arange(40))
    model = learner.init(Key(0))
    target = learner.load_into(model, network().double() if double else network())
    with torch.no_grad():
        target[0].load_state_dict(module[0].state_dict())
        logits = target.eval()(torch.tensor(x).to(target[0].weight.dtype)).float()
    np.testing.assert_allclose(learner.outputs(model, examples), logits, rtol=1e-5, atol=1e-5)
    loss = float(F.cross_entropy(logits, torch.tensor(y)))
    assert learner.mean_loss(model, examples) == pytest.approx(loss, rel=1e-5)


def test_outputs_of_modules_that_are_taken_whole():
    class Squeezing(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze() if float(x.sum()) > -1e9 else x

    learner = TorchLearner(Squeezing(WIDTH, 1), loss="mse", lr=0.1)
    x, _ = columns(1025)  # the last batch of an evaluation is of one example
    y = x[:, 0].copy()
    model = learner.init(Key(0))
    module = learner.load_into(model, Squeezing(WIDTH, 1))
    found = learner.outputs(model, Examples(x, y))
    with torch.no_grad():
        wanted = module(torch.tensor(x))
    assert found.shape == (1025,) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    loss = float(F.mse_loss(wanted, torch.tensor(y)))
    assert learner.mean_loss(model, Examples(x, y)) == pytest.approx(loss, rel=1e-5)


def test_tied_weights_have_all_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x):
            return self.head(self.words(x).mean(1))

    learner = learner_of(Tied())
    source = Tied()
    model = learner.vectors_of(source.state_dict())
    np.testing.assert_array_equal(model["params"], source.words.weight.detach().ravel())
    target = learner.load_into(model, Tied())
    assert torch.equal(target.head.weight, source.words.weight)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 3)), r"it has no 1\.weight, 1\.bias, .* more"),
        (lambda: {"nonsense": np.zeros(3)}, "the model has no nonsense"),
        (
            lambda: {**network().state_dict(), "4.weight": torch.zeros(2, 6)},
            r"shapes differ: 4\.weight is \[2, 6\] and not \[3, 6\]",
        ),
        (lambda: {"params": np.zeros(3, np.float32)}, "the model has sections"),
        (lambda: 3, "cannot take weights from int"),
    ],
)
def test_weights_that_do_not_fit_are_named(source, said):
    with pytest.raises(ConfigurationError, match=said):
        learner_of(network()).vectors_of(source())


def test_targets_that_do_not_fit_are_left_alone():
    learner = learner_of(network())
    target = nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ConfigurationError, match=r"it has no 4\.weight, 4\.bias"):
        learner.load_into(learner.init(Key(0)), target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ConfigurationError, match="cannot load into str"):
        learner.load_into(learner.init(Key(0)), "model.pt")


def test_each_part_by_a_model_of_its_own():
    learner = learner_of(network())
    x, y = columns()
    parts = [Examples(x, y, np.arange(a, a + n)) for a, n in ((0, 7), (7, 20), (27, 13))]
    models = [learner.vectors_of(network()) for _ in parts]
    model = {s: np.stack([each[s] for each in models]) for s in models[0]}
    found = learner.evaluate_each(model, parts, "classification", CLASSES)
    for one, part, sums in zip(models, parts, found, strict=True):
        for name, value in learner.evaluate(one, part, "classification", CLASSES).items():
            np.testing.assert_array_equal(sums[name], value)
    shared = {**model, "buffers": models[0]["buffers"], "counters": models[0]["counters"]}
    found = learner.evaluate_each(shared, parts, "classification", CLASSES)
    mixed = {**models[0], "params": models[2]["params"]}
    wanted = learner.evaluate(mixed, parts[2], "classification", CLASSES)
    np.testing.assert_array_equal(found[2]["loss"], wanted["loss"])


def test_numpy_layers_come_and_go():
    learner = NumpyLearner((WIDTH, 6, CLASSES), lr=0.1)
    model = learner.init(Key(0))
    arrays = learner.load_into(model, {})
    same(learner.vectors_of(arrays), model)
    held = {name: np.zeros_like(array) for name, array in arrays.items()}
    first = held["0.weight"]
    assert learner.load_into(model, held) is held and held["0.weight"] is first
    x, y = columns()
    logits = np.maximum(x @ first + held["0.bias"], 0) @ held["1.weight"] + held["1.bias"]
    np.testing.assert_allclose(learner.outputs(model, Examples(x, y)), logits, atol=1e-5)
    loss = float(F.cross_entropy(torch.tensor(logits), torch.tensor(y)))
    assert learner.mean_loss(model, Examples(x, y)) == pytest.approx(loss, rel=1e-5)
    with pytest.raises(ConfigurationError, match="the model has no other"):
        learner.load_into(model, {"other": first})


def jax_models():
    jax = pytest.importorskip("jax")
    flax, linen = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")
    from atoll.learners.jax import models

    class Net(flax.Module):
        def __init__(self, rngs):
            self.first = flax.Linear(WIDTH, 6, rngs=rngs)
            self.norm = flax.BatchNorm(6, rngs=rngs)
            self.last = flax.Linear(6, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.last(flax.relu(self.norm(self.first(x))))

    class Module(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(6)(x))
            return linen.Dense(CLASSES)(linen.relu(x))

    def start(key):
        return {"w": jax.random.normal(key, (WIDTH, CLASSES)), "b": np.zeros(CLASSES)}

    def forward(params, x):
        return x @ params["w"] + params["b"]

    module, key = Module(), jax.random.key(3)
    own = Net(flax.Rngs(3))
    own.eval()
    return {
        "pure": (models.pure(start, forward), lambda: start(key), lambda tree: (
            lambda x: forward(tree, x))),
        "linen": (
            models.linen(module, (WIDTH,)), lambda: module.init(key, np.zeros((1, WIDTH))),
            lambda variables: lambda x: module.apply(variables, x),
        ),
        "nnx": (models.nnx(Net), lambda: own, lambda net: net),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["pure", "linen", "nnx"])
def test_jax_variables_come_and_go(kind):
    model, make, call = jax_models()[kind]
    from atoll.learners.jax import JaxLearner

    learner, source = JaxLearner(model, lr=0.1), make()
    x, y = columns()
    vectors = learner.vectors_of(source)
    logits = np.asarray(call(source)(x))
    np.testing.assert_allclose(learner.outputs(vectors, Examples(x, y)), logits, atol=1e-5)
    loss = float(F.cross_entropy(torch.tensor(logits), torch.tensor(y)))
    assert learner.mean_loss(vectors, Examples(x, y)) == pytest.approx(loss, rel=1e-5)
    same(learner.vectors_of(learner.load_into(vectors, {})), vectors)

    start = learner.init(Key(1))
    if "buffers" in start:
        start["buffers"] = start["buffers"] + np.float32(0.5)
    target = learner.load_into(start, make())
    assert kind != "nnx" or target is make()
    same(learner.vectors_of(target), start)
    found = learner.outputs(start, Examples(x, y))
    assert np.abs(found - logits).max() > 1e-2
    np.testing.assert_allclose(found, np.asarray(call(target)(x)), atol=1e-5)
    with pytest.raises(ConfigurationError, match="does not fit the model|cannot take weights"):
        learner.vectors_of({"w": np.zeros(2)})


KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = sys.argv[1]
import keras, numpy as np
from atoll.core.random import Key
from atoll.data import Examples
from atoll.learners import Assignment, KerasLearner
from atoll.learners.base import At, Objective

rng = np.random.default_rng(0)
x, y = rng.standard_normal((40, 5)).astype(np.float32), rng.integers(0, 3, 40)
examples = Examples(x, y)

def made():
    stack = [keras.layers.Dense(6), keras.layers.BatchNormalization(), keras.layers.ReLU(),
             keras.layers.Dropout(0.3), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,)), *stack])
    stack[0].trainable = False
    return model

def called(model):
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))

model, other = made(), made()
learner = KerasLearner(model, lr=0.1, batch_size=8)
vectors = learner.vectors_of(model)
np.testing.assert_allclose(learner.outputs(vectors, examples), called(model), atol=1e-5)
start = learner.init(Key(0))
start["buffers"] = start["buffers"] + np.float32(0.5)
other.set_weights(model.get_weights())
assert learner.load_into(start, other) is other
found = learner.outputs(start, examples)
np.testing.assert_allclose(found, called(other), atol=1e-5)
assert abs(found - called(model)).max() > 1e-2
for section, vector in learner.vectors_of(other).items():
    np.testing.assert_array_equal(vector, start[section])
own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
assert abs(learner.mean_loss(start, examples) - float(own(y, found))) < 1e-5
try:
    learner.load_into(start, keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]))
except Exception as error:
    assert "does not fit the model" in str(error), error
else:
    raise AssertionError("another model was loaded into")

def far(outputs, targets, teacher, *, weight):
    return weight * ((outputs - teacher) ** 2).mean()

task = Assignment(1, Key(1))
plain = learner.train(start, examples, task)
here = learner.train(start, examples, task, At(lambda g, w, at: at(w)))
np.testing.assert_allclose(
    learner.asnumpy(here.params), learner.asnumpy(plain.params), atol=1e-6
)
objective = Objective(far, (learner.asarray(vectors["params"]),), {"weight": np.float32(1)})
aimed = [learner.train(start, examples, task, None, objective) for _ in range(2)]
assert np.array_equal(*(learner.asnumpy(each.params) for each in aimed))
assert float(aimed[0].loss) > 0
print("all good")
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_keras_models_come_and_go(backend):
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, "-c", KERAS, backend], capture_output=True, text=True, timeout=300
    )
    if "No module named 'keras'" in done.stderr:
        pytest.skip("keras is not installed")
    assert "all good" in done.stdout, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapted", [False, True])
def test_hugging_face_models_come_and_go(adapted):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from atoll.learners import HuggingFaceLearner

    def made(seed):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8, num_labels=3, pad_token_id=0,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
        if not adapted:
            return model
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        return peft.get_peft_model(model, lora)

    ids = np.random.default_rng(0).integers(1, 30, (12, 8))
    examples = Examples(ids, np.arange(12) % 3)

    def called(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.tensor(ids)).logits.numpy()

    source = made(0)
    learner = HuggingFaceLearner(source, lr=0.1)
    model = learner.vectors_of(source)
    same(model, learner.init(Key(0)))
    same(model, learner.vectors_of(source.state_dict()))
    np.testing.assert_allclose(learner.outputs(model, examples), called(source), atol=1e-5)
    moved = {**model, "params": model["params"] + np.float32(0.05)}
    target = made(0)
    frozen = {n: p.detach().clone() for n, p in target.named_parameters() if not p.requires_grad}
    assert learner.load_into(moved, target) is target
    np.testing.assert_allclose(learner.outputs(moved, examples), called(target), atol=1e-5)
    assert bool(frozen) == adapted
    for name, parameter in target.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    loss = float(F.cross_entropy(torch.tensor(called(target)), torch.tensor(examples.y)))
    assert learner.mean_loss(moved, examples) == pytest.approx(loss, rel=1e-4)


def estimators():
    linear = pytest.importorskip("sklearn.linear_model")
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    # With the usual rates probabilities come so near 0 that only rounding tells them apart.
    slow = {"learning_rate": "constant", "eta0": 0.01}
    return {
        "sgd": linear.SGDClassifier(loss="log_loss", **slow), "hinge": linear.SGDClassifier(),
        "logistic": linear.LogisticRegression(), "mlp": MLPClassifier((4,), max_iter=20),
        "regressor": linear.SGDRegressor(),
        "mlp regressor": MLPRegressor(hidden_layer_sizes=(4,), max_iter=20),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["sgd", "hinge", "logistic", "mlp", "regressor", "mlp regressor"])
def test_estimators_come_and_go(name, classes):
    base = pytest.importorskip("sklearn.base")
    from atoll.learners import SklearnLearner

    estimator, regression = estimators()[name], "regressor" in name
    x, y = columns()
    y = x[:, 0] - x[:, 1] if regression else y % classes
    learner = SklearnLearner(estimator, WIDTH, None if regression else classes)
    fitted = base.clone(estimator).fit(x, y)
    model = learner.vectors_of(fitted)
    examples = Examples(x, y)
    outputs = learner.outputs(model, examples)
    assert outputs.dtype == np.float32

    def predicted(outputs):
        if regression:
            return outputs
        return outputs.argmax(1) if outputs.ndim > 1 else (outputs > 0).astype(np.int64)

    np.testing.assert_allclose(predicted(outputs), fitted.predict(x), rtol=1e-4, atol=1e-4)
    for target in (base.clone(estimator), base.clone(estimator).fit(x[::-1], y)):
        assert learner.load_into(model, target) is target
        np.testing.assert_allclose(target.predict(x), fitted.predict(x), rtol=1e-4, atol=1e-4)
        assert regression or list(target.classes_) == list(range(classes))
    if hasattr(fitted, "predict_proba"):
        chances = fitted.predict_proba(x)[np.arange(40), y]
        assert learner.mean_loss(model, examples) == pytest.approx(-np.log(chances).mean(), 1e-3)
    if regression:
        half = np.square(fitted.predict(x) - y).mean() / 2
        assert learner.mean_loss(model, examples) == pytest.approx(half, rel=1e-3)


def test_estimators_that_do_not_fit_are_named():
    linear = pytest.importorskip("sklearn.linear_model")
    from atoll.learners import SklearnLearner

    learner = SklearnLearner(linear.SGDClassifier(), WIDTH, CLASSES)
    model = learner.init(Key(0))
    with pytest.raises(ConfigurationError, match="fit it first"):
        learner.vectors_of(linear.SGDClassifier())
    with pytest.raises(ConfigurationError, match="is not fitted and no SGDClassifier"):
        learner.load_into(model, linear.LogisticRegression())
    x, y = columns()
    with pytest.raises(ConfigurationError, match=r"coef_ is \[3, 4\] and not \[3, 5\]"):
        learner.vectors_of(linear.SGDClassifier().fit(x[:, :4], y))
