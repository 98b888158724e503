"""Stacks: a cohort trained at once is each client trained by torch alone, on any model."""

import copy
import gc
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from atoll.core.random import Key, permutations
from atoll.data import Examples
from atoll.learners import Affine, Assignment, TorchLearner
from atoll.learners.torch.stacking.layers import WIDE, convolution
from atoll.learners.torch.stacking.rules import Descend, Gather, HeavyBall, rule_for
from atoll.learners.torch.stacking.stack import Stack
from atoll.learners.torch.stacking.tape import Tape
from atoll.learners.torch.stacking.tracing import traced

CLASSES = 4
torch.set_num_threads(1)


def alone(
    learner, model, held, assignment, steps, optimizer=None, correct=None, loss=None, double=False
):
    """The loop that people write: parameters [P], BatchNorm statistics, and the mean loss."""
    module = copy.deepcopy(learner.module).train()
    module = module.double() if double else module
    state = {n: torch.tensor(np.array(v)) for n, v in learner.layout.unpack(model).items()}
    module.load_state_dict(state, strict=False)
    parameters = list(module.parameters())
    start = torch.cat([p.detach().ravel().clone() for p in parameters])
    make = optimizer or torch.optim.SGD
    plain = make(parameters, lr=learner.lr)
    size = learner.batch_size
    word = assignment.key.fold("batches").integer()
    batches = []
    for order in permutations([word], len(held), steps)[0]:
        cut = list(range(0, len(held), size))
        if len(cut) > 1 and len(held) - cut[-1] < learner.smallest_batch:
            cut.pop()
        batches += [order[a:b] for a, b in zip(cut, [*cut[1:], len(held)], strict=True)]
    total = 0.0
    torch.manual_seed(assignment.key.fold("draws").integer())
    for rows in batches[:steps]:
        plain.zero_grad()
        x, y = (torch.tensor(column) for column in held.take(rows))
        x = x.double() if double and x.is_floating_point() else x
        outputs = module(x)
        value = (loss or cross_entropy)(outputs, y)
        value.backward()
        total += value.item()
        if correct is not None:
            scale, constant = correct(start)
            at = 0
            for p in parameters:
                p.grad += scale * p.detach() + constant[at : at + p.numel()].view_as(p)
                at += p.numel()
        plain.step()
    flat = torch.cat([p.detach().ravel() for p in parameters])
    return flat.numpy(), dict(module.named_buffers()), total / steps


def cross_entropy(outputs, y):
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def check(learner, x, y, sizes, **given):
    """Stack and single client against torch alone, for clients of these sizes."""
    parts, at = [], 0
    for size in sizes:
        parts.append(Examples(x, y, np.arange(at, at + size)))
        at += size
    tasks = [Assignment(1, Key(5).fold("work", c)) for c in range(len(sizes))]
    steps = [learner.planned_steps(size) for size in sizes]
    model = learner.init(Key(0))
    correct = given.get("correct")
    correction = None
    if correct is not None:
        scale, constant = correct(torch.tensor(model["params"]))
        correction = Affine(scale, constant)
    together = learner.train_cohort(model, parts, tasks, correction)
    for c, (held, task) in enumerate(zip(parts, tasks, strict=True)):
        wanted, buffers, loss = alone(learner, model, held, task, steps[c], **given)
        own = learner.train(model, held, task, correction)
        for local, params in ((own, own.params), (together, together.params[c])):
            error = np.linalg.norm(params.numpy() - wanted) / np.linalg.norm(wanted)
            if error >= 1e-5:
                # Batch statistics of two or three rows magnify rounding, torch's own too.
                exact, _, _ = alone(learner, model, held, task, steps[c], double=True, **given)
                rounding = np.linalg.norm(wanted - exact) / np.linalg.norm(exact)
                assert error < max(1e-5, 100 * rounding)
            assert local is own or together.steps[c] == steps[c]
        assert own.loss == pytest.approx(loss, rel=1e-4)
        assert float(together.loss[c]) == pytest.approx(loss, rel=1e-4)
        assert int(together.seen[c]) == own.seen
        for section in ("buffers", "counters"):
            if section in model:
                names = [e.name for e in learner.layout.entries if e.section == section]
                expected = np.concatenate([buffers[n].numpy().ravel() for n in names])
                for found in (own.statistics[section], together.statistics[section][c]):
                    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def drawn(shape, size=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, *shape), dtype=np.float32)
    return x, rng.integers(0, CLASSES, size)


@st.composite
def vector_models(draw):
    """Dense models: linear layers, norms, activations, dropout, residual connections."""
    width, parts = 6, []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(
            st.sampled_from(["linear", "norm", "batch", "activation", "dropout", "residual"])
        )
        if kind == "linear":
            new = draw(st.integers(1, 9))
            parts.append(nn.Linear(width, new, bias=draw(st.booleans())))
            width = new
        elif kind == "norm":
            parts.append(nn.LayerNorm(width, elementwise_affine=draw(st.booleans())))
        elif kind == "batch":
            parts.append(nn.BatchNorm1d(width, momentum=draw(st.sampled_from([0.1, None]))))
        elif kind == "activation":
            parts.append(draw(activations()))
        elif kind == "dropout":
            parts.append(nn.Dropout(draw(st.sampled_from([0.0, 0.3]))))
        else:
            parts.append(Residual(nn.Linear(width, width)))
    return nn.Sequential(*parts, nn.Linear(width, CLASSES))


@st.composite
def image_models(draw):
    """Convolutional models: strides, groups, padding, pooling, norms by group and by batch."""
    channels, side, parts = 2, 8, []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([1, 2])) if channels % 2 == 0 else 1
        new = draw(st.sampled_from([2, 4]))
        kernel = draw(st.sampled_from([1, 3]))
        padding = draw(st.sampled_from([0, 1, "same"]))
        stride = 1 if padding == "same" else draw(st.sampled_from([1, 2]))
        parts.append(nn.Conv2d(channels, new, kernel, stride, padding, groups=groups))
        with torch.no_grad():
            side = nn.Sequential(*parts)(torch.zeros(1, 2, 8, 8)).shape[-1]
        channels = new
        kind = draw(st.sampled_from(["none", "group", "batch", "drop", "pool", "average"]))
        # Torch refuses to normalise one value; two become signs, which no rounding survives.
        if kind in ("group", "batch") and side < 3:
            kind = "none"
        if kind == "group":
            parts.append(nn.GroupNorm(2, channels))
        elif kind == "batch":
            parts.append(nn.BatchNorm2d(channels))
        elif kind == "drop":
            parts.append(nn.Dropout2d(0.3))
        parts.append(draw(activations()))
        if kind in ("pool", "average") and side >= 2:
            parts.append(nn.MaxPool2d(2) if kind == "pool" else nn.AvgPool2d(2))
            side //= 2
        if side < 3:
            break
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * side * side, CLASSES))


def activations():
    kinds = [nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.ReLU]
    return st.sampled_from(kinds).map(lambda kind: kind())


class Residual(nn.Module):
    """x + f(x), with a learned scale that belongs to no layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(inner.out_features))

    def reset_parameters(self):
        nn.init.ones_(self.scale)

    def forward(self, x):
        return x + torch.tanh(self.inner(x)) * self.scale


SIZES = st.lists(st.integers(2, 13), min_size=1, max_size=4)


@given(module=vector_models(), sizes=SIZES, batch=st.integers(2, 6), epochs=st.integers(1, 2))
@settings(max_examples=60)
def test_dense_models_agree(module, sizes, batch, epochs):
    learner = TorchLearner(module, lr=0.05, batch_size=batch, epochs=epochs)
    x, y = drawn((6,))
    assert learner.stacks(Examples(x, y)) == ""
    check(learner, x, y, sizes)


@given(module=image_models(), sizes=SIZES, batch=st.integers(2, 6))
@settings(max_examples=40)
def test_convolutional_models_agree(module, sizes, batch):
    learner = TorchLearner(module, lr=0.05, batch_size=batch, weights="given")
    x, y = drawn((2, 8, 8))
    assert learner.stacks(Examples(x, y)) == ""
    check(learner, x, y, sizes)


class Sequence(nn.Module):
    """Embedding, a recurrent or a transformer body, and a head over classes or words."""

    def __init__(self, body, tokens=True):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(CLASSES, 8), body, nn.Linear(8, CLASSES)
        self.places, self.tokens = nn.Embedding(7, 8), tokens

    def forward(self, x):
        hidden = self.words(x)
        if isinstance(self.body, nn.RNNBase):
            hidden = self.body(hidden)[0]
        else:
            later = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
            hidden = self.body(hidden + self.places(torch.arange(x.shape[1])), mask=later)
        return self.head(hidden if self.tokens else hidden.mean(1))


class Last(Sequence):
    """Classifies by the last hidden state of a recurrent body."""

    def forward(self, x):
        if isinstance(self.body, nn.LSTM):
            _, (hidden, _) = self.body(self.words(x))
        else:
            _, hidden = self.body(self.words(x))
        return self.head(hidden[-1])


@pytest.mark.parametrize("body", [nn.LSTM(8, 8, 2, batch_first=True, dropout=0.3),
                                  nn.GRU(8, 8, batch_first=True)])  # fmt: skip
def test_hidden_states_are_the_clients_own(body):
    text = np.random.default_rng(0).integers(0, CLASSES, (60, 8))
    module = Last(body)
    del module.places
    learner = TorchLearner(module, lr=0.05, batch_size=4, epochs=2)
    assert learner.stacks(Examples(text, text[:, 0].copy())) == ""
    check(learner, text, text[:, 0].copy(), [9, 4, 13])


def encoder(dropout, norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout, activation, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    "body",
    [
        nn.LSTM(8, 8, 2, batch_first=True),
        nn.GRU(8, 8, batch_first=True),
        nn.RNN(8, 8, batch_first=True),
        nn.LSTM(8, 8, 2, batch_first=True, dropout=0.4),
        encoder(0.0, False, "relu"),
        encoder(0.3, False, "gelu"),
        encoder(0.3, True, "relu"),
    ],
    ids=["lstm", "gru", "rnn", "lstm-dropout", "encoder", "encoder-dropout", "norm-first"],
)
def test_sequence_models_agree(body):
    rng = np.random.default_rng(0)
    text = rng.integers(0, CLASSES, (60, 8))
    x, y = text[:, :-1].copy(), text[:, 1:].copy()
    module = Sequence(body)
    if isinstance(body, nn.RNNBase):
        del module.places
    learner = TorchLearner(module, lr=0.05, batch_size=4, epochs=2)
    assert learner.stacks(Examples(x, y)) == ""
    check(learner, x, y, [9, 4, 13])


class Causal(nn.Module):
    """A language model that makes its mask itself, as float32 whatever it is run in."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES)
        self.body = encoder(0.0, True, "relu")

    def forward(self, x):
        later = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        return self.head(self.body(self.words(x), mask=later, is_causal=True))


def test_a_mask_made_in_forward_keeps_the_layers_apart():
    text = np.random.default_rng(0).integers(0, CLASSES, (60, 8))
    x, y = text[:, :-1].copy(), text[:, 1:].copy()
    learner = TorchLearner(Causal(), lr=0.05, batch_size=4, epochs=2)
    lowering = learner.lowering(Examples(x, y))
    assert lowering.together.layered and lowering.alone.layered
    check(learner, x, y, [9, 4, 13])


@pytest.mark.parametrize("body", [nn.LSTM(8, 8, batch_first=True), encoder(0.3, False, "gelu")])
def test_a_step_leaves_no_activations_for_the_garbage_collector(body):
    text = np.random.default_rng(0).integers(0, CLASSES, (60, 8))
    examples = Examples(text[:, :-1].copy(), text[:, 1:].copy(), np.arange(8))
    module = Sequence(body)
    if isinstance(body, nn.RNNBase):
        del module.places
    learner = TorchLearner(module, lr=0.05, batch_size=4)
    model = learner.init(Key(0))
    learner.train(model, examples, Assignment(1, Key(1)))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        learner.train(model, examples, Assignment(1, Key(1)))
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        partial(torch.optim.SGD, momentum=0.9),
        partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        partial(torch.optim.SGD, weight_decay=0.1),
        torch.optim.Adam,
        partial(torch.optim.AdamW, weight_decay=0.1),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
    ],
)
@pytest.mark.parametrize("correct", [None, lambda start: (0.1, -0.1 * start)])
def test_optimisers_and_corrections_agree(optimizer, correct):
    module = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    learner = TorchLearner(module, lr=0.01, batch_size=4, epochs=2, optimizer=optimizer)
    x, y = drawn((6,))
    check(learner, x, y, [9, 4, 13], optimizer=optimizer, correct=correct)


def test_weight_decay_is_part_of_the_corrected_gradient():
    """torch adds weight decay inside the step, so to the corrected gradient: both are affine."""
    params = Stack(TorchLearner(nn.Linear(2, 2)).layout.entries, 1)
    decay = partial(torch.optim.SGD, weight_decay=0.5)
    rule = rule_for(params, decay, Affine(0.25), None, 0.1, single=True, complete=True)
    assert isinstance(rule, Descend) and rule.beta == pytest.approx(1 - 0.1 * 0.75)


def test_the_cheapest_right_rule_is_chosen():
    params = Stack(TorchLearner(nn.Linear(2, 2)).layout.entries, 2)

    def kind(optimizer=None, correction=None, norm=None, complete=True):
        return type(
            rule_for(params, optimizer, correction, norm, 0.1, single=False, complete=complete)
        )

    momentum = partial(torch.optim.SGD, momentum=0.9)
    assert kind() is kind(correction=Affine(0.1)) is Descend
    assert kind(momentum) is kind(momentum, Affine(0.1)) is HeavyBall
    assert kind(torch.optim.Adam) is kind(norm=1.0) is kind(complete=False) is Gather
    assert kind(correction=lambda gradient, params: gradient) is Gather


def test_corrections_see_a_leading_axis_of_clients():
    module = nn.Sequential(nn.Linear(6, CLASSES))
    learner = TorchLearner(module, lr=0.05, batch_size=4)
    x, y = drawn((6,))
    parts = [Examples(x, y, np.arange(a, a + n)) for a, n in ((0, 5), (5, 12), (20, 8))]
    tasks = [Assignment(1, Key(1).fold(c)) for c in range(3)]
    seen = []

    def correction(gradient, params):
        seen.append((gradient.shape, params.shape))
        return gradient + 0.1 * params

    model = learner.init(Key(0))
    plain = learner.train_cohort(model, parts, tasks, correction)
    affine = learner.train_cohort(model, parts, tasks, Affine(0.1))
    assert set(seen) == {((3, 28), (3, 28))}
    np.testing.assert_allclose(plain.params, affine.params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["mse", "l1", "binary_cross_entropy", "own"])
def test_losses_agree(loss):
    def own(outputs, targets):
        return (outputs.flatten() - targets.flatten()).square().mean() * 0.5

    x, _ = drawn((6,))
    y = np.random.default_rng(1).normal(size=(60, 1)).astype(np.float32)
    plain = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "own": own,
        "binary_cross_entropy": lambda o, t: F.binary_cross_entropy_with_logits(
            o.flatten(), t.flatten().float()
        ),
    }[loss]
    if loss == "binary_cross_entropy":
        y = (y[:, 0] > 0).astype(np.int64)
    learner = TorchLearner(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)),
        loss=own if loss == "own" else loss, lr=0.05, batch_size=4,
    )  # fmt: skip
    check(learner, x, y, [9, 4, 13], loss=plain)


def test_wide_layers_are_factored_and_agree():
    """Few rows against many weights: W0 - lr D^T H is never multiplied out until the end."""
    width = WIDE // 64
    module = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 64), nn.ReLU(),
                           nn.Linear(64, CLASSES))  # fmt: skip
    learner = TorchLearner(module, lr=0.05, batch_size=4, epochs=2)
    x, y = drawn((6,))
    check(learner, x, y, [9, 13])


class Noting:
    """A rule that only notes the gradients of three clients."""

    def __init__(self, seen):
        self.seen = seen

    def add(self, name, gradient):
        self.seen[name] = gradient.clone()

    def add_one(self, name, client, gradient):
        self.seen.setdefault(name, torch.zeros(3, *gradient.shape))[client] = gradient


def test_wide_layers_over_every_word_are_not_factored():
    """A dense layer inside a sequence meets many rows for each example."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.wide = nn.Embedding(CLASSES, 8), nn.Linear(8, WIDE // 8)
            self.head = nn.Linear(WIDE // 8, CLASSES)

        def forward(self, x):
            return self.head(torch.tanh(self.wide(self.words(x))))

    text = np.random.default_rng(0).integers(0, CLASSES, (60, 4))
    learner = TorchLearner(Words(), lr=0.05, batch_size=1)
    check(learner, text[:, :-1].copy(), text[:, 1:].copy(), [2])
    dense = nn.Sequential(nn.Linear(8, WIDE // 8), nn.Tanh(), nn.Linear(WIDE // 8, CLASSES))
    x, y = drawn((8,))
    program = TorchLearner(dense).lowering(Examples(x, y)).alone
    assert program.linears == {"0.weight", "2.weight"}
    assert TorchLearner(Words()).lowering(Examples(text, text)).alone.linears == set()


class Functional(nn.Module):
    """ReLU and pooling as functions; with `twice` somebody else sees what was rectified."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.before, self.after = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(48, CLASSES)

    def forward(self, x):
        x = torch.relu(self.before(x))
        pooled = F.max_pool2d(x, 2, 2)
        if self.twice:
            pooled = pooled + 0.5 * F.avg_pool2d(x, 2)
        return self.after(pooled.flatten(1))


def pooled(activation, *pooling):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), activation, nn.MaxPool2d(*pooling), nn.Flatten(),
        nn.Linear(48, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "activation", "pool", "moved"),
    [
        (pooled(nn.ReLU(), 2), "1", "2", True),
        (pooled(nn.ReLU(inplace=True), 3, 2, 1), "1", "2", True),
        (pooled(nn.Tanh(), 2), "1", "2", False),
        (Functional(twice=False), torch.relu, F.max_pool2d, True),
        (Functional(twice=True), torch.relu, F.max_pool2d, False),
    ],
)
def test_what_is_only_pooled_is_rectified_afterwards(module, activation, pool, moved):
    graph = traced(module)
    graph.lint()
    order = [node.target for node in graph.nodes]
    assert (order.index(pool) < order.index(activation)) is moved
    x, y = drawn((1, 8, 8), size=24)
    check(TorchLearner(module, lr=0.1, batch_size=5), x, y, [13, 5, 6])


def test_grouped_convolutions_are_the_clients_own():
    """The form for accelerators, run here on a CPU."""
    from atoll.learners.torch.stacking.layers.convolution import _grouped

    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 1, 3, 3, generator=rng)
    bias = torch.randn(3, 4, generator=rng)
    x = torch.randn(6, 2, 5, 5, generator=rng)
    outcomes = []
    for kind in ("each", "groups"):
        seen = {}

        tape = Tape(3, {"w": weight, "b": bias}, {}, rule=Noting(seen))
        entered = tape.input(x)
        entered.wanted = True
        settings = ((1, 1), (1, 1), (1, 1))
        if kind == "each":
            out = convolution(tape, entered, "w", "b", *settings, 2)
        else:
            out = _grouped(
                tape, entered, x, ("w", weight), ("b", bias), (*settings, False, (0, 0)), 2
            )
        out.grad = torch.ones_like(out.data).cumsum(0)
        tape.back()
        outcomes.append((out.data, entered.grad, seen["w"], seen["b"]))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.inner(x) if float(x.sum()) > -1e9 else x


class Centred(nn.Module):
    """Mixes the rows of a batch, so that clients must not be merged."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.inner(x - x.mean(0))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.mark.parametrize("kind", [Branching, Shared, Counting])
def test_what_cannot_be_stacked_steps_aside(kind):
    learner = TorchLearner(kind(), lr=0.05, batch_size=4)
    x, y = drawn((6,))
    held = Examples(x, y)
    assert learner.stacks(held)
    (row, *_) = learner.explain(held)
    assert row[1] in (kind.__name__, "Linear")
    model, task = learner.init(Key(0)), Assignment(1, Key(1))
    local = learner.train(model, held, task)
    if kind is not Shared:  # whose state dict names one array twice
        wanted, _, _ = alone(learner, model, held, task, learner.planned_steps(60))
        np.testing.assert_allclose(local.params.numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_what_mixes_a_batch_is_taken_whole():
    learner = TorchLearner(Centred(), lr=0.05, batch_size=4)
    x, y = drawn((6,))
    ((_, _, how),) = learner.explain(Examples(x, y))
    assert how.startswith("whole, vmap")
    check(learner, x, y, [9, 4, 13])


def test_a_layer_without_a_rule_goes_through_vmap():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(torch.sinh(self.inner(x)))

    learner = TorchLearner(Odd(), lr=0.05, batch_size=4)
    x, y = drawn((6,))
    ((_, _, how),) = learner.explain(Examples(x, y))
    assert "vmap" in how and "sinh" in how
    check(learner, x, y, [9, 4, 13])
    layered = TorchLearner(nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 4)), lr=0.05)
    assert [how for _, kind, how in layered.explain(Examples(x, y)) if kind == "PReLU"] == [
        "vmap over clients"
    ]


def test_optimisers_that_look_at_whole_vectors_are_not_stacked():
    learner = TorchLearner(nn.Linear(6, CLASSES), optimizer=torch.optim.LBFGS)
    x, y = drawn((6,))
    assert "LBFGS" in learner.stacks(Examples(x, y))


def test_evaluation_is_that_of_each_client():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                           nn.Dropout(0.5), nn.Linear(108, CLASSES))  # fmt: skip
    learner = TorchLearner(module)
    x, y = drawn((2, 8, 8), size=400)
    parts = [Examples(x, y, np.arange(a, b)) for a, b in ((0, 3), (3, 140), (140, 141), (141, 400))]
    model = learner.init(Key(3))
    each = learner.evaluate_each(model, parts, "classification", CLASSES)
    reference = copy.deepcopy(module).eval()
    reference.load_state_dict(
        {n: torch.tensor(np.array(v)) for n, v in learner.layout.unpack(model).items()}
    )
    for part, sums in zip(parts, each, strict=True):
        inputs, targets = (torch.tensor(column) for column in part.all())
        with torch.no_grad():
            outputs = reference(inputs)
        assert float(sums["count"]) == len(part)
        loss = F.cross_entropy(outputs, targets, reduction="sum")
        assert float(sums["loss"]) == pytest.approx(float(loss), rel=1e-4)
        assert float(sums["correct"]) == float((outputs.argmax(1) == targets).sum())


def test_a_bare_layer_is_a_model():
    learner = TorchLearner(nn.Linear(6, CLASSES), lr=0.05, batch_size=4)
    x, y = drawn((6,))
    ((layer, kind, how),) = learner.explain(Examples(x, y))
    assert (layer, kind) == ("", "Linear") and "batched product" in how
    check(learner, x, y, [9, 4, 13])


def test_activations_in_place_are_layers_too():
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.SiLU(inplace=True),
                           nn.ReLU6(inplace=True), nn.Linear(5, CLASSES))  # fmt: skip
    learner = TorchLearner(module, lr=0.05, batch_size=4)
    x, y = drawn((6,))
    assert learner.stacks(Examples(x, y)) == ""
    check(learner, x, y, [9, 4, 13])


class Told(nn.Module):
    """Says itself whether it drops out."""

    def __init__(self, *told):
        super().__init__()
        self.inner, self.told = nn.Linear(6, CLASSES), told

    def forward(self, x):
        training = self.told[0] if self.told else self.training
        return self.inner(F.dropout(x, 0.3, training))


def test_functional_dropout_listens_to_what_it_is_told():
    x, y = drawn((6,))
    for module in (Told(), Told(False)):
        learner = TorchLearner(module, lr=0.05, batch_size=4)
        assert learner.stacks(Examples(x, y)) == ""
        check(learner, x, y, [9, 4, 13])
    assert TorchLearner(Told(True)).stacks(Examples(x, y))


class Clamped(nn.Module):
    """Depends on the size of the batch, from three rows on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, CLASSES)

    def forward(self, x):
        return torch.sinh(self.inner(x)) * (3 / max(3, x.shape[0]))


def test_what_counts_rows_never_sees_padding():
    learner = TorchLearner(Clamped(), lr=0.05, batch_size=6)
    x, y = drawn((6,))
    check(learner, x, y, [13, 8, 17])


def test_losses_of_one_element_are_losses():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets).reshape(1)

    learner = TorchLearner(nn.Linear(6, CLASSES), loss=loss, lr=0.05, batch_size=4)
    x, y = drawn((6,))
    check(learner, x, y, [9, 4, 13])


def test_modules_that_squeeze_train_and_are_evaluated_on_one_example():
    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 1)

        def forward(self, x):
            return self.inner(x).squeeze()

    learner = TorchLearner(Squeezing(), loss="binary_cross_entropy", lr=0.05, batch_size=4)
    x, y = drawn((6,))
    held = Examples(x, (y > 1).astype(np.int64), np.arange(5))
    model = learner.init(Key(0))
    assert learner.train(model, held, Assignment(1, Key(1))).steps == 2
    one = Examples(held.x, held.y, np.arange(1))
    assert float(learner.evaluate(model, one, "classification", 2)["count"]) == 1


def test_outputs_that_are_not_one_for_each_example_are_refused():
    from atoll import data
    from atoll.errors import DataError

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(CLASSES, CLASSES)

        def forward(self, x):
            return self.words(x).flatten(0, 1)

    text = np.random.default_rng(0).integers(0, CLASSES, (20, 5))
    clients = data.from_columns(
        text[:, :-1].copy(), text[:, 1:].copy(), np.array([0, 20]), task="tokens", classes=CLASSES
    )
    with pytest.raises(DataError, match=r"16 rows of outputs for 4 examples"):
        TorchLearner(Flat()).check(clients)


def test_batch_statistics_without_a_memory_are_each_clients_own():
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    learner = TorchLearner(nn.Sequential(norm, nn.Linear(6, CLASSES)))
    x, y = drawn((6,))
    x[30:] += 5
    parts = [Examples(x, y, np.arange(0, 30)), Examples(x, y, np.arange(30, 60))]
    model = learner.init(Key(0))
    each = learner.evaluate_each(model, parts, "classification", CLASSES)
    for part, sums in zip(parts, each, strict=True):
        (own,) = learner.evaluate_each(model, [part], "classification", CLASSES)
        assert float(own["loss"]) == float(sums["loss"])


def test_evaluation_leaves_the_model_alone():
    module = nn.Sequential(nn.Embedding(CLASSES, 6, max_norm=0.5), nn.Linear(6, CLASSES))
    learner = TorchLearner(module)
    text = np.random.default_rng(0).integers(0, CLASSES, (20, 5))
    model = learner.init(Key(0))
    before = model["params"].copy()
    learner.evaluate(model, Examples(text, text), "tokens", CLASSES)
    np.testing.assert_array_equal(model["params"], before)


def test_learners_travel_without_what_they_keep_at_hand():
    import pickle

    learner = TorchLearner(nn.Linear(6, CLASSES), lr=0.05)
    fresh = len(pickle.dumps(learner))
    x, y = drawn((6,))
    learner.train(learner.init(Key(0)), Examples(x, y), Assignment(1, Key(1)))
    assert len(pickle.dumps(learner)) == fresh
    assert pickle.loads(pickle.dumps(learner)).layout.digest == learner.layout.digest


class Leaking(nn.Module):
    """Recurrent, and everyone's output depends a little on the others in the batch."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1] + 1e-3 * x.mean())


def test_a_recurrent_module_that_mixes_clients_a_little_is_not_stacked():
    x, y = drawn((6, 4), size=20)
    assert "otherwise than by autograd" in TorchLearner(Leaking()).stacks(Examples(x, y))


class Between(nn.Module):
    """Changes what was rectified before it is pooled."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        positive = torch.relu(x)
        x.add_(1)
        return self.head(F.max_pool2d(positive, 2).flatten(1))


def test_pooling_sees_what_the_activation_saw():
    x, y = drawn((1, 8, 8), size=24)
    learner = TorchLearner(Between(), lr=0.1, batch_size=5)
    assert learner.lowering(Examples(x, y)).alone is not None
    before = x.copy()
    check(learner, x, y, [13, 5, 6])
    np.testing.assert_array_equal(x, before)


LIGHT = """
import sys
import numpy as np
from torch import nn
from atoll.data import Examples
from atoll.core.random import Key
from atoll.learners import Assignment, TorchLearner

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 4), nn.GRU(4, 5), nn.Linear(5, 9)

    def forward(self, x):
        return self.head(self.body(self.words(x))[0])

x = np.arange(40).reshape(8, 5) % 9
learner = TorchLearner(Reader(), lr=0.1, batch_size=4)
held = Examples(x, x)
learner.train(learner.init(Key(0)), held, Assignment(1, Key(0)))
assert learner.stacks(held) == ""
print(*{"sympy", "torch._dynamo"} & set(sys.modules))
"""


def test_training_imports_no_compiler():
    """torch's symbolic shapes take most of a second and fifty megabytes."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [], done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
