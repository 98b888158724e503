"""Inputs by name: a picture beside a table, in every learner that takes or refuses them."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key, permutations
from atoll.data import Examples
from atoll.data.examples import joined
from atoll.errors import DataError
from atoll.learners import Assignment, NumpyLearner
from atoll.testing import LEARNER_CHECKS

CLASSES = 3


def both(count=120, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    image = rng.normal(size=(count, 1, 4, 4)) + y[:, None, None, None]
    age = rng.normal(size=(count, 2)) - y[:, None]
    return {"image": image.astype(np.float32), "age": age.astype(np.float32)}, y


@pytest.fixture(scope="module")
def clients():
    x, y = both()
    return data.from_arrays(x, y, name="both").dirichlet(clients=4, alpha=2.0, seed=1)


def two_inputs():
    torch = pytest.importorskip("torch")
    from torch import nn

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(1, 3, 3)
            self.last = nn.Linear(12 + 2, CLASSES)

        def forward(self, image, age):
            seen = torch.relu(self.convolution(image)).flatten(1)
            return self.last(torch.cat([seen, age], 1))

    return Both()


def torch_learner(**settings):
    pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    return TorchLearner(two_inputs(), **{"lr": 0.1, "batch_size": 16, **settings})


def jax_learner():
    jax = pytest.importorskip("jax")
    from atoll.learners.jax import JaxLearner, pure

    def start(key):
        first, second = jax.random.split(key)
        return {
            "image": 0.1 * jax.random.normal(first, (16, CLASSES)),
            "age": 0.1 * jax.random.normal(second, (2, CLASSES)),
        }

    def apply(params, x):
        return x["image"].reshape(-1, 16) @ params["image"] + x["age"] @ params["age"]

    return JaxLearner(pure(start, apply), lr=0.1, batch_size=16)


def linen_learner():
    flax = pytest.importorskip("flax.linen")
    from atoll.learners.jax import JaxLearner, linen

    class Net(flax.Module):
        @flax.compact
        def __call__(self, x):
            flat = x["image"].reshape(len(x["image"]), -1)
            return flax.Dense(CLASSES)(flat) + flax.Dense(CLASSES)(x["age"])

    return JaxLearner(linen(Net(), {"image": (1, 4, 4), "age": (2,)}), lr=0.1, batch_size=16)


def test_columns_are_shared_and_rows_picked_alike(clients):
    x, y = both()
    assert clients.shape == {"image": (1, 4, 4), "age": (2,)}
    assert clients.summary()["input_shape"] == {"image": [1, 4, 4], "age": [2]}
    assert "inputs image [1, 4, 4], age [2]" in str(clients)
    held = clients.train(1)
    assert held.x is clients.x and len(held) == clients.size(1)
    few, labels = held.take(np.array([2, 0]))
    rows = clients.train_rows[1][[2, 0]]
    for name, column in x.items():
        np.testing.assert_array_equal(few[name], column[rows])
    np.testing.assert_array_equal(labels, y[rows])
    whole = joined([clients.train(0), clients.train(2)])
    assert whole.x is clients.x and len(whole) == clients.size(0) + clients.size(2)
    copies = joined([Examples(*clients.train(c).all()) for c in (0, 2)])
    np.testing.assert_array_equal(copies.all()[0]["age"], whole.all()[0]["age"])
    assert clients.subset([1, 3]).train(0).take(slice(1))[0].keys() == {"image", "age"}


def test_digests_tell_names_and_contents(clients):
    x, y = both()
    same = data.from_arrays(x, y, name="both").dirichlet(clients=4, alpha=2.0, seed=1)
    assert same.digest() == clients.digest()
    for other in ({**x, "age": x["age"] + 1}, {"picture": x["image"], "age": x["age"]}):
        changed = data.from_arrays(other, y).dirichlet(clients=4, alpha=2.0, seed=1)
        assert changed.digest() != clients.digest()


def test_every_way_to_populations_takes_them(tmp_path):
    x, y = both()
    ids = np.arange(120).reshape(-1, 1)
    dataset = data.from_arrays({**x, "ids": ids, "wide": x["age"].astype(float)}, y, test=None)
    assert {name: str(c.dtype) for name, c in dataset.x.items()} == {
        "image": "float32", "age": "float32", "ids": "int64", "wide": "float32"
    }  # fmt: skip
    assert len(dataset.take(np.arange(5))) == 5
    held = {"a": ({n: c[:50] for n, c in x.items()}, y[:50]),
            "b": ({n: c[50:] for n, c in x.items()}, y[50:])}  # fmt: skip
    gathered = data.from_clients(held, test=0.0)
    np.testing.assert_array_equal(gathered.train(1).all()[0]["image"], x["image"][50:])
    flat = data.from_columns(x, y, np.array([0, 50, 120]), classes=CLASSES)
    np.testing.assert_array_equal(flat.train(1).all()[0]["age"], x["age"][50:])
    made = data.generated(lambda c, rng: both(7, c), clients=3, examples=7, classes=CLASSES)
    assert made.shape == clients_shape(x) and made.train(2).all()[0]["age"].shape == (7, 2)
    assert made.digest()
    tested = data.from_arrays(x, y, test=(x, y)).iid(clients=3)
    assert len(tested.test_part) == 120


def clients_shape(x):
    return {name: column.shape[1:] for name, column in x.items()}


def test_inputs_that_do_not_fit_are_refused(clients):
    x, y = both()
    short = {**x, "age": x["age"][:-1]}
    for arguments, said in (
        ((short, y), "119 inputs 'age' but 120 targets"),
        (({}, y), "inputs by name are a dict"),
        (({**x, "age": np.full((120, 2), np.nan)}, y), "inputs 'age' hold NaN"),
        (({**x, "age": np.array(["a"] * 120)}, y), "inputs 'age' have dtype"),
    ):
        with pytest.raises(DataError, match=said):
            data.from_arrays(*arguments)
    with pytest.raises(DataError, match="test part: inputs have shape"):
        data.from_arrays(x, y, test=({"image": x["image"]}, y))
    with pytest.raises(DataError, match="inputs by name .* feature_shift changes one"):
        data.from_arrays(x, y).feature_shift(clients=3, noise=1.0)
    with pytest.raises(DataError, match="client 'b': the inputs are age"):
        data.from_clients({"a": (x, y), "b": ({"age": x["age"]}, y)})
    with pytest.raises(DataError, match="inputs age are float64"):
        data.from_columns({**x, "age": x["age"].astype(float)}, y, [0, 120], classes=3)
    with pytest.raises(DataError, match="by name .*, but NumpyLearner takes one array"):
        NumpyLearner((18, CLASSES)).check(clients)
    pytest.importorskip("sklearn")
    from sklearn.linear_model import SGDClassifier

    from atoll.learners import SklearnLearner

    with pytest.raises(DataError, match="by name .*, but SklearnLearner takes one array"):
        SklearnLearner(SGDClassifier(), 18, CLASSES).check(clients)


def test_a_module_of_other_names_is_told_what_it_gets(clients):
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    with pytest.raises(DataError, match=r"inputs have shape image \[1, 4, 4\], age \[2\]"):
        TorchLearner(torch.nn.Linear(2, CLASSES)).check(clients)


def test_training_is_the_loop_written_by_hand(clients):
    torch = pytest.importorskip("torch")
    learner = torch_learner(epochs=2)
    model, examples = learner.init(Key(0)), clients.train(0)
    assignment = Assignment(1, Key(3))
    local = learner.train(model, examples, assignment)
    module = learner.load_into(model, two_inputs())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for order in permutations([assignment.key.integer("batches")], len(examples), 2)[0]:
        for start in range(0, len(examples), 16):
            x, y = examples.take(order[start : start + 16])
            optimizer.zero_grad()
            outputs = module(torch.from_numpy(x["image"]), torch.from_numpy(x["age"]))
            torch.nn.functional.cross_entropy(outputs, torch.from_numpy(y)).backward()
            optimizer.step()
    wanted = learner.vectors_of(module)["params"]
    np.testing.assert_allclose(local.params.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_stacks_step_aside_and_say_why(clients):
    learner = torch_learner()
    assert learner.stacks(clients.train(0)).startswith("the inputs have names (image, age)")
    assert not learner.prefers_stacks(clients.train(0))
    assert learner.activation_bytes(clients.train(0)) == 0
    jax = jax_learner()
    assert jax.stacks(clients.train(0)) == "" and jax.activation_bytes(clients.train(0)) > 0


@pytest.mark.parametrize("check", LEARNER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", [torch_learner, jax_learner, linen_learner])
def test_learner(make, check, clients):
    check(make(), clients)


@pytest.mark.parametrize("algorithm", [algorithms.FedAvg(), algorithms.Scaffold()], ids=str)
def test_engines_make_the_same_bytes(algorithm, clients):
    federation = Federation(
        learner=torch_learner(), algorithm=algorithm,
        schedule=schedules.Synchronous(rounds=2, cohort=3),
    )  # fmt: skip
    engines = (
        "sequential(workers=1)", "sequential(workers=2)", "sequential(processes=2)"
    )  # fmt: skip
    runs = [federation.simulate(clients, seed=2, engine=engine) for engine in engines]
    for run in runs[1:]:
        assert run.model["params"].tobytes() == runs[0].model["params"].tobytes()
        assert run.metrics == runs[0].metrics
    assert {"accuracy", "accuracy_client_mean"} < set(runs[0].metrics)


KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = sys.argv[1]
import keras
import numpy as np
from atoll import data
from atoll.core.random import Key
from atoll.data import Examples
from atoll.learners import Assignment, KerasLearner, Metric

rng = np.random.default_rng(0)
y = rng.integers(0, 3, 60)
x = {"image": rng.normal(size=(60, 1, 4, 4)), "age": rng.normal(size=(60, 2)) + y[:, None]}
clients = data.from_arrays(x, y).iid(clients=2)
image, age = keras.Input((1, 4, 4), name="image"), keras.Input((2,), name="age")
merged = keras.layers.Concatenate()([keras.layers.Flatten()(image), age])
model = keras.Model({"image": image, "age": age}, keras.layers.Dense(3)(merged))
hits = Metric(lambda outputs, targets: (outputs.argmax(1) == targets).sum())
learner = KerasLearner(model, lr=0.1, batch_size=16, metrics={"hits": hits})
learner.check(clients)
start, held = learner.init(Key(0)), clients.train(0)
local = learner.train(start, held, Assignment(1, Key(1)))
after = {**start, "params": np.asarray(learner.asnumpy(local.params))}
assert learner.mean_loss(after, held) < learner.mean_loss(start, held)
found = learner.figures(learner.evaluate(after, held, clients.task, 3), clients.task)
assert found["hits"] == found["accuracy"], found
learner.load_into(after, model)
given, _ = held.all()
outputs = np.asarray(keras.ops.convert_to_numpy(model(given)))
assert np.allclose(outputs, learner.outputs(after, held), atol=1e-5)
print("all good")
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_keras_models_take_them_by_name(backend):
    for package in ("keras", backend):
        # Not importorskip: which backend it imports is settled in the other process.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", KERAS, backend], capture_output=True, text=True, timeout=300
    )
    assert "all good" in done.stdout, done.stderr[-3000:]


def test_hugging_face_models_take_their_inputs_by_name():
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertForSequenceClassification

    from atoll.learners import HuggingFaceLearner

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (24, 6))
    ids[:, 4:] = 0
    y = rng.integers(0, 2, 24)
    mask = (ids != 0).astype(np.int64)
    learner = HuggingFaceLearner(model, lr=0.1)
    start = learner.init(Key(0))
    outputs = [
        learner.outputs(start, Examples(x, y))
        for x in (ids, {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids})
    ]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs[2], outputs[0], rtol=1e-5, atol=1e-6)
    named = {"input_ids": ids, "attention_mask": mask}
    clients = data.from_arrays(named, y).iid(clients=2)
    learner.check(clients)
    learner.train(start, clients.train(0), Assignment(1, Key(0)))
