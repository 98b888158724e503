"""Tasks: what they take and refuse, and multi-label figures against scikit-learn's."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.data import tasks
from atoll.data.sums import add
from atoll.errors import DataError
from atoll.learners import NumpyLearner
from atoll.learners.metrics import figures

SYNC = schedules.Synchronous(rounds=1, cohort=2)


def answers(seed, count, labels):
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, labels)) < 0.4).astype(np.float32)
    logits = rng.choice([-1, 1], (count, labels)) * 1.02 ** rng.integers(-90, 90, targets.shape)
    return logits.astype(np.float32), targets


@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 7))
def test_multilabel_figures_are_scikit_learns(seed, count, labels):
    sk = pytest.importorskip("sklearn.metrics")
    logits, targets = answers(seed, count, labels)
    found = figures(tasks.MULTILABEL.sums(logits, targets, 3.0, labels), "multilabel")
    said = (logits > 0).astype(np.float32)
    assert found["loss"] == pytest.approx(3.0 / count)
    each = [sk.accuracy_score(targets[:, k], said[:, k]) for k in range(labels)]
    assert found["accuracy"] == pytest.approx(np.mean(each))
    exact = (targets == said).all(axis=1).mean()
    assert found["exact"] == pytest.approx(exact)
    if labels > 1:
        assert found["exact"] == pytest.approx(sk.accuracy_score(targets, said))
    counted = [k for k in range(labels) if targets[:, k].any() or said[:, k].any()]
    if counted:
        for name in ("micro", "macro"):
            wanted = [sk.f1_score(targets[:, k], said[:, k], zero_division=0.0) for k in counted]
            wanted = np.mean(wanted) if name == "macro" else sk.f1_score(
                targets.ravel(), said.ravel(), zero_division=0.0
            )  # fmt: skip
            assert found[f"{name}_f1"] == pytest.approx(wanted)
    else:
        assert math.isnan(found["macro_f1"]) and math.isnan(found["micro_f1"])
    both = [k for k in range(labels) if 0 < targets[:, k].sum() < count]
    if both:
        # Scores are in bins of their own, so that ties are the only halves.
        wanted = np.mean([sk.roc_auc_score(targets[:, k], logits[:, k]) for k in both])
        assert found["auc"] == pytest.approx(wanted, abs=1e-12)
    else:
        assert math.isnan(found["auc"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_multilabel_sums_add_whatever_the_parts(sizes, seed):
    logits, targets = answers(seed, sum(sizes), 4)
    cuts = np.cumsum(sizes)[:-1]
    parts = [
        tasks.MULTILABEL.sums(*part, float(len(part[1])), 4)
        for part in zip(np.split(logits, cuts), np.split(targets, cuts), strict=True)
    ]
    whole, together = tasks.MULTILABEL.sums(logits, targets, float(sum(sizes)), 4), add(parts)
    assert whole.keys() == together.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(together[name], value)


def test_beyond_the_limit_there_is_no_auc_of_labels():
    logits, targets = answers(0, 5, 101)
    sums = tasks.MULTILABEL.sums(logits, targets, 0.0, 101)
    assert "scores" not in sums and "auc" not in tasks.MULTILABEL.figures(sums)
    assert "auc" not in tasks.MULTILABEL.metrics(101)
    assert "macro_f1" not in tasks.CLASSIFICATION.metrics(1001)


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=str)
def test_a_task_gives_the_metrics_it_names_and_is_itself_elsewhere(task):
    rng = np.random.default_rng(0)
    targets = {
        "classification": rng.integers(0, 2, 30), "regression": rng.normal(size=30),
        "tokens": rng.integers(0, 2, (30, 4)), "multilabel": rng.integers(0, 2, (30, 2)),
    }[task.name]  # fmt: skip
    outputs = {"tokens": (30, 4, 2), "regression": (30,)}.get(task.name, (30, 2))
    y = task.targets(targets, 2)
    found = task.figures(task.sums(rng.normal(size=outputs).astype("f"), y, 1.0, 2))
    assert set(found) == set(task.metrics(2)) and task.main in found
    assert task.higher <= set(found)
    assert figures({}, task) == {} and y.dtype == task.target_dtype
    assert pickle.loads(pickle.dumps(task)) == task and hash(task) == hash(type(task)())
    assert str(task) == task.name and tasks.task_of(task.name) is task


def test_multi_label_data_are_cleaned_counted_and_told():
    x, y = np.zeros((6, 3)), np.array([[0, 1], [1, 1], [0, 0]] * 2)
    dataset = data.from_arrays(x, y, task="multilabel", class_names=["a", "b"])
    assert (dataset.task, dataset.classes, dataset.y.dtype) == (data.MULTILABEL, 2, np.float32)
    assert data.from_arrays(x, y == 1, task=data.MULTILABEL).classes == 2
    clients = dataset.iid(clients=2)
    assert "multilabel, 2 labels" in str(clients)
    assert json.loads(json.dumps(clients.summary()))["task"] == "multilabel"
    held = {"a": (x[:3], y[:3]), "b": (x[3:], y[3:])}
    assert data.from_clients(held, task="multilabel").classes == 2
    with pytest.raises(DataError, match="no labels to skew"):
        dataset.dirichlet(clients=2, alpha=1.0)
    with pytest.raises(DataError, match="no label distribution"):
        clients.label_distribution()


@pytest.mark.parametrize(
    ("y", "classes", "said"),
    [
        (np.zeros(6, int), None, r"shape \[N, K\], 0 or 1 for each of K labels"),
        (np.full((6, 2), 2), None, "must be 0 or 1"),
        (np.full((6, 2), np.nan), None, "must be 0 or 1"),
        (np.zeros((6, 2)), 3, "there are 2 labels, but classes=3"),
    ],
)
def test_targets_that_are_no_labels_are_refused(y, classes, said):
    with pytest.raises(DataError, match=f"mine: .*{said}"):
        data.from_arrays(np.zeros((6, 3)), y, task="multilabel", classes=classes, name="mine")


class Counts(tasks.Task):
    """Numbers of events, judged by how far they are off, together."""

    name = "counts"
    main = "off"

    def targets(self, y, classes):
        if (y < 0).any():
            raise DataError("counts are not negative")
        return np.ascontiguousarray(y, np.float32)

    def metrics(self, classes):
        return ("loss", "off")

    def sums(self, outputs, targets, loss_sum, classes):
        off = np.abs(outputs.reshape(targets.shape).astype(float) - targets).sum()
        return {"count": np.array(float(len(targets))), "loss": np.array(loss_sum), "off": off}

    def figures(self, sums):
        return {name: float(sums[name]) / float(sums["count"]) for name in ("loss", "off")}


def test_a_task_of_peoples_own_is_trained_and_measured():
    rng = np.random.default_rng(0)
    x = rng.random((80, 3))
    y = (x.sum(axis=1) * 3).round()
    clients = data.from_arrays(x, y, task=Counts()).iid(clients=4)
    federation = Federation(
        learner=NumpyLearner((3, 1), loss="squared", lr=0.1), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=5, cohort=4),
        evaluation=Evaluation(clients_every=1),
    )  # fmt: skip
    run = federation.simulate(clients)
    assert set(run.metrics) == {
        "loss", "off", "off_client_mean", "off_client_std", "off_client_worst", "off_client_count",
    }  # fmt: skip
    model = federation.learner.outputs(run.model, clients.test_part).reshape(-1)
    assert run.metrics["off"] == pytest.approx(np.abs(model - clients.test_part.all()[1]).mean())
    # Less is better: the worst tenth is the largest of four.
    assert run.metrics["off_client_worst"] == max(run.per_client["off"].values())
    assert clients.summary()["metrics"] == {"loss": False, "off": False}
    assert federation.baselines(clients).central.own.keys() == {"loss", "off"}
    with pytest.raises(DataError, match="arrays: counts are not negative"):
        data.from_arrays(x, -y - 1, task=Counts())
    with pytest.raises(DataError, match=r"'accuracy' is not known; use loss, off"):
        Federation(
            learner=federation.learner, algorithm=algorithms.FedAvg(), schedule=SYNC,
            evaluation=Evaluation(spread=("accuracy",)),
        ).simulate(clients)  # fmt: skip


def test_losses_of_other_tasks_are_refused():
    x, y = np.zeros((20, 3)), np.tile([[0, 1], [1, 0]], (10, 1))
    clients = data.from_arrays(x, y, task="multilabel").iid(clients=2)
    for loss in ("cross_entropy", "squared"):
        with pytest.raises(DataError, match="multilabel set; loss .* does not fit it"):
            NumpyLearner((3, 2), loss=loss).check(clients)
    NumpyLearner((3, 2), loss="binary_cross_entropy").check(clients)
    with pytest.raises(DataError, match="targets of arrays have 2 values"):
        NumpyLearner((3, 3), loss="binary_cross_entropy").check(clients)
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    with pytest.raises(DataError, match="multilabel set; loss 'mse' does not fit"):
        TorchLearner(torch.nn.Linear(3, 2), loss="mse").check(clients)
    with pytest.raises(DataError, match="2 labels, but the model gives 3 outputs|does not fit"):
        TorchLearner(torch.nn.Linear(3, 3), loss="binary_cross_entropy").check(clients)
    pytest.importorskip("sklearn")
    from sklearn.linear_model import SGDClassifier

    from atoll.learners import SklearnLearner

    with pytest.raises(DataError, match="multilabel set with several targets"):
        SklearnLearner(SGDClassifier(), 3, 2).check(clients)


def test_a_spread_that_a_client_cannot_have_is_refused():
    x, y = np.zeros((12, 2)), np.array([[0, 1]] * 6 + [[1, 0], [0, 1]] * 3)
    held = {"flat": (x[:6], y[:6]), "fine": (x[6:], y[6:])}
    clients = data.from_clients(held, task="multilabel", test=0.5)
    federation = Federation(
        learner=NumpyLearner((2, 2), loss="binary_cross_entropy"), algorithm=algorithms.FedAvg(),
        schedule=SYNC, evaluation=Evaluation(spread=("auc",)),
    )  # fmt: skip
    with pytest.raises(DataError, match="client 'flat' has no label that .* its AUC is not"):
        federation.simulate(clients)
