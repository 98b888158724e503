"""Targets that do not count are in no figure, whoever holds them and however they are batched."""

import math
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key
from atoll.data.examples import Examples
from atoll.data.tasks import TOKENS
from atoll.learners import TorchLearner
from atoll.learners.torch import NextTokens

PAD, WORDS = 0, 11


def texts(sizes, length=6, seed=0):
    """Texts of so many real tokens each, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, WORDS, (len(sizes), length + 1))
    real = np.arange(length + 1) < np.array(sizes)[:, None]
    tokens = np.where(real, tokens, PAD)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


class Flat(nn.Module):
    """torch's own loss, which takes rows."""

    def __init__(self, **settings):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(**settings)
        self.ignore_index = self.loss.ignore_index

    def forward(self, outputs, targets):
        return self.loss(outputs.flatten(0, -2), targets.flatten())


def flat(outputs, targets, ignore_index):
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


LOSSES = {
    "NextTokens": NextTokens(PAD),
    "torch": Flat(ignore_index=PAD),
    "partial": partial(flat, ignore_index=PAD),
}
SIZES = [7, 3, 1, 5, 7, 2, 0, 4, 4, 6]


def model():
    return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS))


def truth(module, x, y):
    """Loss, accuracy and perplexity over real tokens, by torch."""
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(x))
        y = torch.from_numpy(y)
        real = y != PAD
        loss = float(F.cross_entropy(logits[real], y[real]))
        right = float((logits.argmax(-1) == y)[real].float().mean())
    return {"loss": loss, "accuracy": right, "perplexity": math.exp(loss)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("cuts", [(10,), (2, 7, 10), range(1, 11)], ids=str)
def test_figures_are_over_the_tokens_that_count(loss, cuts):
    x, y = texts(SIZES)
    learner = TorchLearner(model(), loss=loss)
    vectors = learner.init(Key(0))
    starts = [0, *cuts][:-1]
    parts = [Examples(x[a:b], y[a:b]) for a, b in zip(starts, cuts, strict=True)]
    sums = learner.evaluate_each(vectors, parts, TOKENS, WORDS)
    total = {name: sum(each[name] for each in sums) for name in sums[0]}
    wanted = truth(learner.load_into(vectors, model()), x, y)
    assert learner.figures(total, TOKENS) == pytest.approx(wanted, rel=1e-5)
    assert learner.mean_loss(vectors, Examples(x, y)) == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_gradient_of_all_examples_weighs_batches_by_what_counts_in_them(loss):
    x, y = texts(SIZES)
    learner = TorchLearner(model(), loss=loss)
    vectors = learner.init(Key(0))
    module = learner.load_into(vectors, model())
    real = torch.from_numpy(y) != PAD
    F.cross_entropy(module(torch.from_numpy(x))[real], torch.from_numpy(y)[real]).backward()
    wanted = torch.cat([p.grad.flatten() for p in module.parameters()])
    for chunk in (10, 3, 1):
        found, _ = learner.gradient(vectors, Examples(x, y), Key(1), chunk=chunk)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("engine", ["sequential", "stacked"])
def test_a_site_of_padding_alone_makes_nobodys_loss_nan(loss, engine):
    held = {"texts": texts(SIZES * 4), "empty": texts([0] * 20)}
    clients = data.from_clients(held, task="tokens", classes=WORDS, test=0.5)
    run = Federation(
        learner=TorchLearner(model(), loss=loss, lr=0.5, batch_size=4),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=2),
    ).simulate(clients, engine=engine)
    assert math.isfinite(run.metrics["loss"])
    for record in run.history:
        assert all(math.isfinite(value) for value in record.metrics.values())
    wanted = truth(run.load_into(model()), *clients.test_part.all())
    assert {name: run.metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_models_of_transformers_that_write_leave_padding_out():
    transformers = pytest.importorskip("transformers")
    from atoll.learners.huggingface import HuggingFaceLearner

    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    writer = transformers.GPT2LMHeadModel(config)  # whose name has no "causal" in it
    learner = HuggingFaceLearner(writer, pad=PAD)
    assert learner.loss == NextTokens(PAD)
    x, y = texts(SIZES)
    found = learner.figures(
        learner.evaluate(learner.init(Key(0)), Examples(x, y), TOKENS, WORDS), TOKENS
    )
    with torch.no_grad():
        ids, targets = torch.from_numpy(x), torch.from_numpy(y)
        logits = writer.eval()(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        real = targets != PAD
        loss = float(F.cross_entropy(logits[real], targets[real]))
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_jax_weighs_examples_by_their_tokens_that_count():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    from atoll.learners.jax import JaxLearner, pure

    class Over:
        """Each example's mean over its tokens that count."""

        ignore_index = PAD

        def __call__(self, outputs, targets):
            logs = jax.nn.log_softmax(outputs)
            picked = -jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
            real = targets != PAD
            return (picked * real).sum(1) / jnp.maximum(real.sum(1), 1)

    def init(key):
        return {"table": 0.1 * jax.random.normal(key, (WORDS, WORDS))}

    learner = JaxLearner(pure(init, lambda params, x: params["table"][x]), loss=Over(), lr=1.0)
    x, y = texts(SIZES)
    vectors = learner.init(Key(0))
    sums = learner.evaluate(vectors, Examples(x, y), TOKENS, WORDS)
    table = torch.from_numpy(np.array(vectors["params"]).reshape(WORDS, WORDS)).requires_grad_()
    targets = torch.from_numpy(y)
    real = targets != PAD
    loss = F.cross_entropy(table[torch.from_numpy(x)][real], targets[real])
    assert learner.figures(sums, TOKENS)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    found, _ = learner.gradient(vectors, Examples(x, y), Key(1), chunk=3)
    np.testing.assert_allclose(found, table.grad.flatten().numpy(), atol=1e-6)
