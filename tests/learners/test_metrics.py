import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.learners import metrics

sk = pytest.importorskip("sklearn.metrics")


@given(st.integers(0, 20), st.integers(2, 6), st.integers(1, 60))
def test_classification_figures_are_scikit_learns(seed, classes, count):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    sums = metrics.classification_sums(logits, labels, 12.5, classes)
    figures = metrics.figures(sums, "classification")
    predicted = logits.argmax(axis=1)
    assert figures["loss"] == pytest.approx(12.5 / count)
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert figures["macro_f1"] == pytest.approx(
        sk.f1_score(labels, predicted, average="macro", zero_division=0.0)
    )
    if classes == 2 and len(set(labels)) == 2:
        margin = logits[:, 1].astype(float) - logits[:, 0]
        # Pairs in one bin, whose width is 1/256 of their size, count half.
        assert figures["auc"] == pytest.approx(sk.roc_auc_score(labels, margin), abs=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0, 1000.0])
def test_auc_is_exact_where_scores_are_apart_at_any_scale(scale):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    logits = (scale * rng.choice([-1, 1], 500) * 1.02 ** rng.integers(-100, 100, 500)).astype("f")
    sums = metrics.classification_sums(logits, labels, 0.0, 2)
    assert metrics.figures(sums, "classification")["auc"] == pytest.approx(
        sk.roc_auc_score(labels, logits), abs=1e-12
    )


def test_auc_of_one_class_is_undefined():
    sums = metrics.classification_sums(np.ones(3, np.float32), np.ones(3, np.int64), 0.0, 2)
    assert math.isnan(metrics.figures(sums, "classification")["auc"])


@given(st.integers(0, 20), st.integers(2, 40))
def test_regression_figures_are_scikit_learns(seed, count):
    rng = np.random.default_rng(seed)
    wanted, outputs = rng.normal(size=(2, count)).astype(np.float32)
    figures = metrics.figures(metrics.regression_sums(outputs, wanted, 1.0), "regression")
    assert figures["mae"] == pytest.approx(sk.mean_absolute_error(wanted, outputs))
    assert figures["rmse"] == pytest.approx(math.sqrt(sk.mean_squared_error(wanted, outputs)))
    assert figures["r2"] == pytest.approx(sk.r2_score(wanted, outputs), rel=1e-4, abs=1e-4)


def test_perplexity_is_the_exponential_of_the_token_loss():
    logits = np.log(np.full((2, 3, 4), 0.25))
    sums = metrics.token_sums(logits, np.zeros((2, 3), np.int64), 6 * math.log(4))
    assert metrics.figures(sums, "tokens")["perplexity"] == pytest.approx(4.0)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_sums_of_parts_are_the_sums_of_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, sum(sizes))
    logits = rng.normal(size=(sum(sizes), 2))
    cuts = np.cumsum(sizes)[:-1]
    parts = [
        metrics.classification_sums(part, own, float(len(own)), 2)
        for part, own in zip(np.split(logits, cuts), np.split(labels, cuts), strict=True)
    ]
    whole = metrics.classification_sums(logits, labels, float(len(labels)), 2)
    together = metrics.add(parts)
    assert whole.keys() == together.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(together[name], value)


def test_spread_of_twenty_clients_by_hand():
    values = [0.5] * 18 + [0.1, 0.3]
    spread = metrics.spread(values, "accuracy")
    assert spread["accuracy_client_mean"] == pytest.approx((18 * 0.5 + 0.4) / 20)
    assert spread["accuracy_client_worst"] == pytest.approx(0.2)
    assert metrics.spread(values, "loss")["loss_client_worst"] == pytest.approx(0.5)
    assert metrics.spread([math.nan, 1.0], "accuracy")["accuracy_client_mean"] == 1.0
    assert metrics.spread([math.nan], "accuracy") == {}
