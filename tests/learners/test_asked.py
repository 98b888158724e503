"""Gradients at other parameters and objectives: what algorithms ask of learners, from theory."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

from atoll.core.random import Key, permutations
from atoll.data import Examples
from atoll.errors import ConfigurationError
from atoll.learners import Affine, Assignment, NumpyLearner, TorchLearner
from atoll.learners.base import At, Objective

CLASSES, WIDTH = 3, 5
torch.set_num_threads(1)


class Odd(nn.Module):
    """A module that no rule lowers, so that autograd trains it: it looks at its inputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if float(x.sum()) > -1e9 else self.inner(-x)


def dense():
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def rich():
    return nn.Sequential(
        nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, CLASSES)
    )


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, CLASSES)
    )


def torch_learner(make, odd=False, **settings):
    given = {"lr": 0.1, "batch_size": 4, "epochs": 2, **settings}
    return TorchLearner(Odd(make()) if odd else make(), **given)


def jax_start(key):
    import jax

    first, last = jax.random.split(key)
    return {
        "a": 0.5 * jax.random.normal(first, (WIDTH, 6)),
        "b": 0.5 * jax.random.normal(last, (6, CLASSES)),
    }


def jax_forward(params, x):
    import jax.numpy as jnp

    return jnp.tanh(x @ params["a"]) @ params["b"]


def jax_learner(**settings):
    pytest.importorskip("jax")
    from atoll.learners.jax import JaxLearner, pure

    return JaxLearner(
        pure(jax_start, jax_forward), **{"lr": 0.1, "batch_size": 4, "epochs": 2, **settings}
    )


def nnx_learner(**settings):
    flax = pytest.importorskip("flax.nnx")
    from atoll.learners.jax import JaxLearner, nnx

    class Net(flax.Module):
        def __init__(self, rngs):
            self.first = flax.Linear(WIDTH, 6, rngs=rngs)
            self.norm = flax.BatchNorm(6, rngs=rngs)
            self.drop = flax.Dropout(0.3, rngs=rngs)
            self.last = flax.Linear(6, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(flax.relu(self.norm(self.first(x)))))

    return JaxLearner(nnx(Net), **{"lr": 0.1, "batch_size": 4, "epochs": 2, **settings})


def numpy_learner(**settings):
    return NumpyLearner(
        (WIDTH, 6, CLASSES), **{"lr": 0.1, "batch_size": 4, "epochs": 2, **settings}
    )


LEARNERS = {
    "dense": partial(torch_learner, dense),
    "dense, odd": partial(torch_learner, dense, odd=True),
    "rich": partial(torch_learner, rich),
    "rich, odd": partial(torch_learner, rich, odd=True),
    "convolutional": partial(torch_learner, convolutional),
    "adam": partial(torch_learner, dense, optimizer=torch.optim.Adam),
    "clipped": partial(torch_learner, dense, max_gradient_norm=0.3),
    "clipped, odd": partial(torch_learner, dense, odd=True, max_gradient_norm=0.3),
    "bfloat16": partial(torch_learner, dense, precision="bfloat16"),
    "jax": jax_learner,
    "jax, clipped": partial(jax_learner, max_gradient_norm=0.3),
    "nnx": nnx_learner,
    "numpy": numpy_learner,
    "numpy, momentum": partial(numpy_learner, momentum=0.9),
}
every = pytest.mark.parametrize("name", LEARNERS)
objecting = pytest.mark.parametrize("name", [name for name in LEARNERS if "numpy" not in name])
#: Those whose clients can be stacked.
STACKS = ["dense", "rich", "convolutional", "adam", "clipped", "jax"]


def columns(size=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, WIDTH), dtype=np.float32)
    return x, rng.integers(0, CLASSES, size)


def holder(size=11):
    x, y = columns()
    return Examples(x, y, np.arange(size))


TASK = Assignment(1, Key(3).fold("work"))


def params_of(learner, local):
    return np.asarray(learner.asnumpy(local.params))


def nearby(params, seed, size=0.3):
    noise = np.random.default_rng(seed).normal(0, size, params.shape)
    return (params + noise).astype(np.float32)


def module_in(learner):
    """Whether the learner is torch's."""
    return isinstance(learner, TorchLearner)


def plain_loss(learner):
    """The learner's own loss, as an objective in its framework."""
    if module_in(learner):
        return F.cross_entropy
    import optax

    return lambda outputs, y: optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def calibrated(outputs, y, *, offset):
    """FedLC: cross-entropy of logits that are moved by what a client has of each class."""
    if isinstance(outputs, torch.Tensor):
        return F.cross_entropy(outputs - offset, y)
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(outputs - offset, y).mean()


def distilled(outputs, y, teacher, other, *, weight):
    """Near one model's outputs and away from another's, in any framework."""
    near, far = ((outputs - teacher) ** 2).mean(), ((outputs - other) ** 2).mean()
    return calibrated(outputs, y, offset=0.0) + weight[0] * near - weight[1] * far


def test_odd_modules_are_trained_by_autograd():
    lowering = torch_learner(dense, odd=True).lowering(holder())
    assert lowering.alone is None and lowering.together is None


@every
def test_the_gradient_here_is_the_gradient(name):
    """at(params) is the gradient, draws and statistics included, however often it is asked."""
    learner = LEARNERS[name]()
    model = learner.init(Key(0))
    plain = learner.train(model, holder(), TASK)
    far = learner.asarray(nearby(model["params"], 1))

    def rule(gradient, params, at):
        at(far)
        return at(params)

    here = learner.train(model, holder(), TASK, At(rule))
    np.testing.assert_allclose(params_of(learner, here), params_of(learner, plain), atol=1e-6)
    for section, vector in plain.statistics.items():
        np.testing.assert_allclose(here.statistics[section], vector, atol=1e-6)
    assert float(here.loss) == pytest.approx(float(plain.loss), rel=1e-5)


@objecting
def test_an_objective_that_is_the_loss_changes_nothing(name):
    learner = LEARNERS[name]()
    model = learner.init(Key(0))
    plain = learner.train(model, holder(), TASK)
    own = learner.train(model, holder(), TASK, None, Objective(plain_loss(learner)))
    np.testing.assert_allclose(params_of(learner, own), params_of(learner, plain), atol=1e-6)
    for section, vector in plain.statistics.items():
        np.testing.assert_allclose(own.statistics[section], vector, atol=1e-6)
    assert float(own.loss) == pytest.approx(float(plain.loss), rel=1e-5)


@objecting
def test_an_offset_of_zero_is_no_offset(name):
    learner = LEARNERS[name]()
    model, found = learner.init(Key(0)), []
    for offset in (np.zeros(CLASSES, np.float32), np.array([2, 0, -2], np.float32)):
        objective = Objective(calibrated, given={"offset": learner.asarray(offset)})
        found.append(params_of(learner, learner.train(model, holder(), TASK, None, objective)))
    plain = params_of(learner, learner.train(model, holder(), TASK))
    np.testing.assert_allclose(found[0], plain, atol=1e-6)
    assert np.abs(found[1] - plain).max() > 1e-3


def asked(learner, model, seed, place=None, clients=3):
    """A rule and an objective that hold arrays of each client, or of one of them."""
    points = np.stack([nearby(model["params"], seed + c) for c in range(clients)])
    weights = np.stack([[0.5 + c, 0.1 * c] for c in range(clients)]).astype(np.float32)
    if place is not None:
        points, weights = points[place], weights[place]
    own, weight = learner.asarray(points), learner.asarray(np.ascontiguousarray(weights))
    shared = learner.asarray(model["params"].copy())
    held = [own, weight, shared]
    rule = At(lambda g, params, at: 0.5 * g + 0.5 * at(params + 0.1 * own) - 0.1 * at(shared))
    return rule, Objective(distilled, (shared, own), {"weight": weight}), held


@objecting
@pytest.mark.parametrize("both", [False, True])
def test_what_is_given_stays_as_it_is(name, both):
    learner = LEARNERS[name]()
    model = learner.init(Key(0))
    rule, objective, held = asked(learner, model, 1, place=1)
    before = [np.array(learner.asnumpy(array)) for array in held]
    received = {section: vector.copy() for section, vector in model.items()}
    learner.train(model, holder(), TASK, rule if both else Affine(0.1, held[0]), objective)
    learner.train(model, holder(), TASK, lambda gradient, params: held[0])
    for array, vector in zip(held, before, strict=True):
        np.testing.assert_array_equal(learner.asnumpy(array), vector)
    for section, vector in received.items():
        np.testing.assert_array_equal(model[section], vector)


def test_an_optimiser_that_writes_into_gradients_writes_into_no_constant():
    nesterov = partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True)
    learner = torch_learner(dense, odd=True, optimizer=nesterov)
    constant = torch.ones(learner.layout.size)
    learner.train(learner.init(Key(0)), holder(), TASK, lambda gradient, params: constant)
    assert torch.equal(constant, torch.ones(learner.layout.size))


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("kind", ["at", "objective", "both", "affine"])
def test_a_stack_is_asked_as_each_alone(name, kind):
    """Ragged clients, of which the one with the fewest steps comes first."""
    learner = LEARNERS[name]()
    x, y = columns()
    parts = [Examples(x, y, np.arange(a, a + n)) for a, n in ((0, 3), (10, 13), (30, 6))]
    tasks = [Assignment(1, Key(5).fold("work", c)) for c in range(3)]
    model = learner.init(Key(0))

    def given(place=None):
        rule, objective, held = asked(learner, model, 4, place)
        return {
            "at": (rule, None), "objective": (None, objective), "both": (rule, objective),
            "affine": (Affine(0.1, 0.01 * held[0]), objective),
        }[kind]  # fmt: skip

    together = learner.train_cohort(model, parts, tasks, *given())
    rows = params_of(learner, together)
    for c, (part, task) in enumerate(zip(parts, tasks, strict=True)):
        alone = learner.train(model, part, task, *given(c))
        wanted = params_of(learner, alone)
        error = np.linalg.norm(rows[c] - wanted) / np.linalg.norm(wanted - model["params"])
        assert error < (1e-3 if name == "adam" else 3e-5)
        for number in ("steps", "path", "examples", "seen", "loss"):
            column = np.asarray(learner.asnumpy(getattr(together, number)))
            assert column.shape == (3, 1)
            assert column[c, 0] == pytest.approx(float(getattr(alone, number)), rel=1e-4)
        for section, vector in alone.statistics.items():
            np.testing.assert_allclose(together.statistics[section][c], vector, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "jax"])
def test_who_has_finished_asks_for_nothing(name):
    """A rule that keeps what it finds ends, for each of a stack, as if it had been alone."""
    learner = LEARNERS[name]()
    x, y = columns()
    parts = [Examples(x, y, np.arange(a, a + n)) for a, n in ((0, 3), (10, 13))]
    tasks = [Assignment(1, Key(5).fold("work", c)) for c in range(2)]
    model = learner.init(Key(0))

    def train(place=None):
        """APFL's rule: a model of one's own that is trained beside the shared one."""
        held = {"own": 0.0 * learner.asarray(model["params"])}

        def rule(gradient, params, at):
            held["own"] = held["own"] - 0.1 * at(0.5 * held["own"] + 0.5 * params)
            return gradient

        if place is None:
            learner.train_cohort(model, parts, tasks, At(rule))
        else:
            learner.train(model, parts[place], tasks[place], At(rule))
        return np.asarray(learner.asnumpy(held["own"]))

    together = train()
    for c in range(2):
        np.testing.assert_allclose(together[c], train(c), atol=1e-5)


def by_hand(learner, model, held, direction):
    """The local loop with a direction(gradient_at, params [P]) per batch, in plain torch."""
    module = copy.deepcopy(learner.module).train()
    vector = torch.tensor(model["params"])
    shapes = [(n, p.shape) for n, p in module.named_parameters()]
    (order, *rest) = permutations([TASK.key.integer("batches")], len(held), learner.epochs)[0]
    for rows in (order, *rest):
        for start in range(0, len(held), learner.batch_size):
            x, y = (torch.tensor(c) for c in held.take(rows[start : start + learner.batch_size]))

            def outputs(at, x=x):
                parts = torch.split(at, [shape.numel() for _, shape in shapes])
                named = {n: p.view(s) for (n, s), p in zip(shapes, parts, strict=True)}
                return torch.func.functional_call(module, named, (x,))

            vector = vector - learner.lr * direction(outputs, y, vector)
    return vector.detach().numpy()


def slope(loss, at):
    leaf = at.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("odd", [False, True])
def test_sharpness_aware_steps_are_those_by_hand(odd):
    """FedSAM's local step: the gradient at w + rho g / |g|."""
    learner, rho = torch_learner(dense, odd), 0.1
    model = learner.init(Key(0))

    def rule(gradient, params, at):
        norm = (gradient * gradient).sum(-1)[..., None] ** 0.5
        return at(params + rho * gradient / (norm + 1e-12))

    def direction(outputs, y, w):
        def loss(at):
            return F.cross_entropy(outputs(at), y)

        gradient = slope(loss, w)
        return slope(loss, w + rho * gradient / torch.linalg.vector_norm(gradient))

    local = learner.train(model, holder(), TASK, At(rule))
    wanted = by_hand(learner, model, holder(), direction)
    np.testing.assert_allclose(local.params, wanted, atol=1e-6)
    plain = learner.train(model, holder(), TASK).params
    assert np.abs(np.asarray(plain) - wanted).max() > 1e-3


@pytest.mark.parametrize("odd", [False, True])
def test_objectives_are_those_by_hand(odd):
    """Distillation from two models, with gradients through the trained one's outputs alone."""
    learner = torch_learner(dense, odd)
    model = learner.init(Key(0))
    _, objective, (own, weight, shared) = asked(learner, model, 1, place=2)

    def direction(outputs, y, w):
        def loss(at):
            beside = [outputs(shared).detach(), outputs(own).detach()]
            return distilled(outputs(at), y, *beside, weight=weight)

        return slope(loss, w)

    local = learner.train(model, holder(), TASK, None, objective)
    wanted = by_hand(learner, model, holder(), direction)
    np.testing.assert_allclose(local.params, wanted, atol=1e-6)


def test_objectives_mean_the_same_in_jax():
    """Against torch, on the same parameters, batches and loss."""
    ours = jax_learner()
    learner = torch_learner(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES, bias=False)
        )
    )

    def to_torch(params):
        arrays = ours.layout.unpack({"params": params})
        return np.concatenate([arrays["a"].T.ravel(), arrays["b"].T.ravel()])

    model = ours.init(Key(0))
    rule, objective, (own, weight, shared) = asked(ours, model, 1, place=2)
    theirs = [torch.tensor(to_torch(np.asarray(each))) for each in (shared, own)]
    same = Objective(distilled, tuple(theirs), {"weight": torch.tensor(np.asarray(weight))})
    again = At(
        lambda g, w, at: 0.5 * g + 0.5 * at(w + 0.1 * theirs[1]) - 0.1 * at(theirs[0])
    )  # fmt: skip
    start = {"params": to_torch(model["params"])}
    for one, other in (((None, objective), (None, same)), ((rule, objective), (again, same))):
        found = to_torch(np.asarray(ours.train(model, holder(), TASK, *one).params))
        wanted = learner.train(start, holder(), TASK, *other).params
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), batch=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_any_stack_is_its_clients(sizes, batch):
    learner = torch_learner(dense, batch_size=batch)
    x, y = columns()
    starts = np.cumsum([0, *sizes])
    parts = [Examples(x, y, np.arange(a, a + n)) for a, n in zip(starts, sizes, strict=False)]
    tasks = [Assignment(1, Key(5).fold("work", c)) for c in range(len(sizes))]
    model = learner.init(Key(0))
    rule, objective, _ = asked(learner, model, 4, clients=len(sizes))
    together = learner.train_cohort(model, parts, tasks, rule, objective)
    for c, (part, task) in enumerate(zip(parts, tasks, strict=True)):
        mine, aim, _ = asked(learner, model, 4, c, clients=len(sizes))
        alone = learner.train(model, part, task, mine, aim)
        np.testing.assert_allclose(together.params[c], alone.params, atol=2e-5)


def test_numbers_of_a_stack_work_with_its_vectors():
    learner = torch_learner(dense)
    x, y = columns()
    parts = [Examples(x, y, np.arange(n)) for n in (3, 8)]
    tasks = [Assignment(1, Key(5).fold("work", c)) for c in range(2)]
    local = learner.train_cohort(learner.init(Key(0)), parts, tasks)
    for number in (local.steps, local.path, local.examples, local.seen, local.loss):
        scaled = local.params / number
        assert scaled.shape == local.params.shape and scaled.dtype == torch.float32
        np.testing.assert_allclose(scaled[1], local.params[1] / float(number[1]))


def coupled(outputs, y):
    """A loss that looks at other rows: the spread of a batch's outputs."""
    return calibrated(outputs, y, offset=0.0) + outputs.std()


def test_losses_across_rows_are_taken_where_batches_are_exact():
    model = torch_learner(dense).init(Key(0))
    torch_learner(dense).train(model, holder(), TASK, None, Objective(coupled))
    exact = nnx_learner()
    exact.train(exact.init(Key(0)), holder(), TASK, None, Objective(coupled))
    filled = jax_learner()
    with pytest.raises(ConfigurationError, match="no mean over the examples"):
        filled.train(filled.init(Key(0)), holder(), TASK, None, Objective(coupled))


def test_what_a_learner_cannot_do_is_said():
    learner = numpy_learner()
    with pytest.raises(ConfigurationError, match="minimises its own loss and no other"):
        learner.train(learner.init(Key(0)), holder(), TASK, None, Objective(coupled))
    linear = pytest.importorskip("sklearn.linear_model")
    from atoll.learners import SklearnLearner

    black = SklearnLearner(linear.SGDClassifier(), WIDTH, CLASSES)
    for asks in ((Affine(),), (At(lambda g, w, at: g),)):
        with pytest.raises(ConfigurationError, match="can only fit"):
            black.train(black.init(Key(0)), holder(), TASK, *asks)
    with pytest.raises(ConfigurationError, match="no other"):
        black.train(black.init(Key(0)), holder(), TASK, None, Objective(coupled))


def test_recorded_steps_are_not_taken_for_objectives():
    """Where plain steps of a device are recorded, an objective's must not be replayed instead."""
    learner = torch_learner(dense, batch_size=2)
    learner.__dict__["_settings"] = replace(learner._settings, graphs=True)
    x, y = columns()
    parts = [Examples(x, y, np.arange(a, a + 4)) for a in (0, 8)]
    tasks = [Assignment(1, Key(5).fold("work", c)) for c in range(2)]
    model = learner.init(Key(0))
    rule, objective, _ = asked(learner, model, 4, clients=2)
    learner.train_cohort(model, parts, tasks)
    together = learner.train_cohort(model, parts, tasks, rule, objective)
    usual = torch_learner(dense, batch_size=2).train_cohort(model, parts, tasks, rule, objective)
    np.testing.assert_allclose(together.params, usual.params, atol=1e-6)
