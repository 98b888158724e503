"""Every learner under the checks that other people's learners can run too."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from atoll import data, testing
from atoll.core.random import Key
from atoll.learners import NumpyLearner
from atoll.learners.base import At
from atoll.testing import LEARNER_CHECKS

ids = {"ids": lambda value: getattr(value, "__name__", None)}


@pytest.fixture(scope="module")
def clients():
    """Four clients of different sizes, three classes in eight dimensions."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    x = (rng.normal(size=(150, 8)) + 2 * np.eye(8)[y]).astype(np.float32)
    return data.from_arrays(x, y, classes=3, name="peaks").dirichlet(clients=4, alpha=1.0, seed=1)


def numpy_learner():
    return NumpyLearner(layers=(8, 6, 3), lr=0.1, batch_size=16)


def sklearn_learner():
    linear = pytest.importorskip("sklearn.linear_model")
    from atoll.learners import SklearnLearner

    return SklearnLearner(
        linear.SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.05), 8, 3
    )


def torch_mlp():
    nn = pytest.importorskip("torch").nn
    from atoll.learners import TorchLearner

    return TorchLearner(
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), lr=0.1, batch_size=16
    )


def torch_dropout_batchnorm():
    nn = pytest.importorskip("torch").nn
    from atoll.learners import TorchLearner

    return TorchLearner(
        nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)
        ),
        lr=0.1, batch_size=16,
    )  # fmt: skip


def torch_adam():
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    module = torch.nn.Sequential(torch.nn.Linear(8, 3))
    return TorchLearner(module, lr=0.01, batch_size=16, optimizer=torch.optim.Adam)


def softmax_start(key):
    import jax

    return {"weight": 0.3 * jax.random.normal(key, (8, 3)), "bias": np.zeros(3, np.float32)}


def softmax(params, x):
    return x @ params["weight"] + params["bias"]


def jax_functions():
    pytest.importorskip("jax")
    from atoll.learners.jax import JaxLearner, pure

    return JaxLearner(pure(softmax_start, softmax), lr=0.1, batch_size=16)


def jax_adam():
    optax = pytest.importorskip("optax")
    from atoll.learners.jax import JaxLearner, pure

    return JaxLearner(
        pure(softmax_start, softmax), lr=0.01, batch_size=16, optimizer=optax.adam,
        max_gradient_norm=1.0,
    )  # fmt: skip


def flax_linen():
    flax = pytest.importorskip("flax.linen")
    from atoll.learners.jax import JaxLearner, linen

    class Net(flax.Module):
        @flax.compact
        def __call__(self, x, train=False):
            x = flax.relu(flax.Dense(6)(x))
            return flax.Dense(3)(flax.Dropout(0.2, deterministic=not train)(x))

    return JaxLearner(linen(Net(), (8,)), lr=0.1, batch_size=16, epochs=2)


def flax_nnx():
    flax = pytest.importorskip("flax.nnx")
    from atoll.learners.jax import JaxLearner, nnx

    class Net(flax.Module):
        def __init__(self, rngs):
            self.first = flax.Linear(8, 6, rngs=rngs)
            self.norm = flax.BatchNorm(6, rngs=rngs)
            self.drop = flax.Dropout(0.2, rngs=rngs)
            self.last = flax.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(flax.relu(self.norm(self.first(x)))))

    return JaxLearner(nnx(Net), lr=0.1, batch_size=16)


LEARNERS = [
    numpy_learner, sklearn_learner, torch_mlp, torch_dropout_batchnorm, torch_adam, jax_functions,
    jax_adam, flax_linen, flax_nnx,
]  # fmt: skip


@pytest.mark.parametrize("check", LEARNER_CHECKS, **ids)
@pytest.mark.parametrize("make", LEARNERS, **ids)
def test_learner(make, check, clients):
    check(make(), clients)


KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = sys.argv[1]
import keras
import numpy as np
from atoll import data
from atoll.core.random import Key
from atoll.learners import KerasLearner
from atoll.testing import LEARNER_CHECKS

rng = np.random.default_rng(0)
y = rng.integers(0, 3, 150)
x = (rng.normal(size=(150, 8)) + 2 * np.eye(8)[y]).astype(np.float32)
clients = data.from_arrays(x, y, classes=3).dirichlet(clients=4, alpha=1.0, seed=1)
layers = keras.layers
plain = [layers.Dense(6, activation="relu"), layers.Dense(3)]
rich = [layers.Dense(6), layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(3)]
rich[0].trainable = False
for number, stack in enumerate((plain, rich)):
    model = keras.Sequential([keras.Input((8,)), *stack])
    given = model.get_weights()
    own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = own if number else "cross_entropy"
    learner = KerasLearner(model, lr=0.1, batch_size=16, loss=loss)
    sections = {section: size for section, size in learner.layout.sizes.items()}
    assert sections == ({"params": 75} if not number else {"params": 33, "buffers": 12}), sections
    for check in LEARNER_CHECKS:
        check(learner, clients)
    for before, after in zip(given, model.get_weights(), strict=True):
        assert np.array_equal(before, after), "the given model was changed"
    # Keras's own evaluation of the same weights is the independent one.
    start = learner.init(Key(7))
    arrays = learner.layout.unpack(start)
    from atoll.learners.keras.model import Weights
    for name, variable in {**Weights.of(model).trained, **Weights.of(model).averaged}.items():
        variable.assign(arrays[name])
    logits = np.asarray(keras.ops.convert_to_numpy(model(x[:50], training=False)))
    mine = learner.evaluate(start, data.Examples(x[:50], y[:50]), "classification", 3)
    assert mine["correct"] == (logits.argmax(1) == y[:50]).sum()
    assert abs(float(mine["loss"]) / 50 - float(own(y[:50], logits))) < 1e-4
print("all good")
"""


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_keras(backend):
    for package in ("keras", backend):
        # Not importorskip: which backend it imports is settled in the other process.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", KERAS, backend], capture_output=True, text=True, timeout=300
    )
    assert "all good" in done.stdout, done.stderr[-3000:]


def jax_layers():
    from atoll.learners.jax import pure

    def start(key):
        return {"w": np.full((8, 3), 0.1), "b": np.zeros(3)}

    return pure(start, lambda params, x: x @ params["w"] + params["b"])


def test_optax_sees_the_models_tree(clients):
    """Against optax on the tree: decay of matrices alone, and a rate that it keeps in its state."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    from functools import partial

    from atoll.learners import Assignment
    from atoll.learners.jax import JaxLearner

    def masked(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    kinds = (
        partial(optax.adamw, weight_decay=0.5, mask=masked), optax.lamb,
        lambda lr: optax.inject_hyperparams(optax.sgd)(learning_rate=lr),
    )  # fmt: skip
    for make in kinds:
        learner = JaxLearner(jax_layers(), lr=0.05, batch_size=None, steps=3, optimizer=make)
        model, held = learner.init(Key(0)), clients.train(0)
        local = learner.train(model, held, Assignment(1, Key(0)))
        x, y = held.all()
        params = jax_layers().initial(None)
        params = {name: jax.numpy.asarray(value, "float32") for name, value in params.items()}

        def loss(params, x=x, y=y):
            logits = x @ params["w"] + params["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        optimizer = make(0.05)
        state = optimizer.init(params)
        for _ in range(3):
            change, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, change)
        arrays = learner.layout.unpack({"params": np.asarray(local.params)})
        for name, value in params.items():
            np.testing.assert_allclose(arrays[name], value, rtol=1e-4, atol=1e-6)


def test_models_whose_rows_mix_are_refused(clients):
    pytest.importorskip("jax")
    from atoll.errors import DataError
    from atoll.learners.jax import JaxLearner, pure

    mixing = pure(softmax_start, lambda params, x: softmax(params, x - x.mean(axis=0)))
    with pytest.raises(DataError, match="depends on what else is in its batch"):
        JaxLearner(mixing, lr=0.1).check(clients)


class Doubling(NumpyLearner):
    """Gives twice the gradient."""

    def gradient(self, model, examples, key, chunk=1024):
        found, statistics = super().gradient(model, examples, key, chunk)
        return 2 * found, statistics


class Careless(NumpyLearner):
    """Trains the vectors it was given, and draws its model from nowhere."""

    def train(self, model, examples, assignment, correction=None, objective=None):
        local = super().train(model, examples, assignment, correction)
        model["params"][:] = local.params
        return local

    def init(self, key):
        model = super().init(key)
        model["params"] += np.random.default_rng().normal(size=self.layout.size).astype(np.float32)
        return model


class Deaf(NumpyLearner):
    """Does not listen to corrections, and counts all work as whole."""

    def train(self, model, examples, assignment, correction=None, objective=None):
        whole = type(assignment)(assignment.round, assignment.key)
        return super().train(model, examples, whole, None)


class Averaging(NumpyLearner):
    """Evaluates to means, which do not add up, and takes any data."""

    def evaluate(self, model, examples, task, classes):
        sums = super().evaluate(model, examples, task, classes)
        return {**sums, "loss": sums["loss"] / sums["count"]}

    def check(self, data):
        return None


class Forgetful(NumpyLearner):
    """Goes on from where its last client ended."""

    def train(self, model, examples, assignment, correction=None, objective=None):
        before = self.__dict__.get("last", 0.0)
        moved = {"params": model["params"] + np.float32(0.1) * before}
        local = super().train(moved, examples, assignment, correction)
        self.__dict__["last"] = local.params - model["params"]
        return local


class Tidy(NumpyLearner):
    """Takes examples in their order, whatever the key, and says that it saw one."""

    def train(self, model, examples, assignment, correction=None, objective=None):
        from dataclasses import replace

        fixed = type(assignment)(assignment.round, Key(0), assignment.fraction)
        return replace(super().train(model, examples, fixed, correction), seen=1)


class Greedy(NumpyLearner):
    """Trains on everybody's rows, at the first round's rate, without the limit of the norm."""

    def train(self, model, examples, assignment, correction=None, objective=None):
        from dataclasses import replace

        free = replace(self, max_gradient_norm=None)
        everyone = type(examples)(examples.x, examples.y)
        first = type(assignment)(1, assignment.key, assignment.fraction)
        return NumpyLearner.train(free, model, everyone, first, correction)

    def evaluate(self, model, examples, task, classes):
        sums = super().evaluate(model, examples, task, classes)
        return {**sums, "correct": sums["count"]}

    def fixed(self):
        return str(np.random.default_rng().random())


class Boastful(NumpyLearner):
    """Claims what it does not do: every point is where it stands, every objective is its own."""

    abilities = frozenset({"gradient", "at", "objective", "outputs"})

    def train(self, model, examples, assignment, correction=None, objective=None):
        if isinstance(correction, At):
            rule = correction.rule
            correction = lambda gradient, params: rule(gradient, params, lambda at: gradient)  # noqa: E731
        return super().train(model, examples, assignment, correction)

    def outputs(self, model, examples):
        return -super().outputs(model, examples)

    def evaluate_each(self, model, parts, task, classes):
        first = {name: vector[0] if vector.ndim > 1 else vector for name, vector in model.items()}
        return super().evaluate_each(first, parts, task, classes)


class Obliging(NumpyLearner):
    """Takes everything, and claims and does little of it."""

    abilities = frozenset({"gradient"})

    def train(self, model, examples, assignment, correction=None, objective=None):
        affine = None if isinstance(correction, At) else correction
        return super().train(model, examples, assignment, affine)

    def vectors_of(self, source):
        if set(source) == {"params"}:
            return super().vectors_of(source)
        return super().vectors_of({**self.layout.unpack(self.init(Key(0))), **source})


class Writing(NumpyLearner):
    """Writes into what corrections hold."""

    def descend(self, model, examples, key):
        from contextlib import contextmanager

        @contextmanager
        def begun():
            with NumpyLearner.descend(self, model, examples, key) as descent:
                plain = descent.gradient_at

                def gradient_at(batch, points, objective=None):
                    points += 1
                    return plain(batch, points, objective)

                descent.gradient_at = gradient_at
                yield descent

        return begun()


@pytest.mark.parametrize(
    ("kind", "caught"),
    [
        (
            Boastful,
            {
                "gradients_elsewhere_are_gradients",
                "objectives_are_minimised",
                "outputs_are_what_is_evaluated",
                "each_part_may_have_its_own_model",
            },
        ),
        (Obliging, {"what_is_not_claimed_is_refused", "weights_come_and_go_by_name"}),
        (Writing, {"gradients_elsewhere_are_gradients"}),
        (Tidy, {"the_local_loop_is_as_documented", "keys_are_what_draws"}),
        (
            Greedy,
            {
                "other_peoples_rows_do_not_matter",
                "predictions_are_scored",
                "identities_are_steady",
                "the_local_loop_is_as_documented",
            },
        ),
        (Doubling, {"gradients_are_slopes", "one_step_is_down_the_gradient"}),
        (Careless, {"init_fits_the_layout_and_the_seed", "training_leaves_the_model_alone"}),
        (Deaf, {"corrections_are_obeyed", "work_is_counted"}),
        (Averaging, {"evaluations_add_up", "check_accepts_these_and_refuses_others"}),
        (Forgetful, {"training_forgets_whom_it_trained", "runs_learn_and_repeat"}),
    ],
)
def test_broken_learners_are_caught(kind, caught, clients):
    learner = kind(layers=(8, 6, 3), lr=0.1, batch_size=16)
    for check in LEARNER_CHECKS:
        if check.__name__ in caught:
            with pytest.raises(AssertionError):
                check(learner, clients)


def test_stacks_that_differ_are_caught(clients):
    class Drifting(NumpyLearner):
        def stacks(self, examples):
            return ""

        def train_cohort(self, model, examples, assignments, correction=None, objective=None):
            locals = [self.train(model, e, a) for e, a in zip(examples, assignments, strict=True)]
            first = locals[0]
            return type(first)(
                np.stack([each.params + 0.01 for each in locals]),
                *(
                    np.array([[getattr(each, name)] for each in locals])
                    for name in ("steps", "path", "examples", "seen", "loss")
                ),
            )

    with pytest.raises(AssertionError, match="in a stack from alone"):
        testing.stacks_are_their_clients(Drifting(layers=(8, 3), lr=0.1), clients)
