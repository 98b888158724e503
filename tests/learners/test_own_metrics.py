"""Metrics of people's own: they add whatever the batches, and are used wherever metrics are."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from atoll import Evaluation, Federation, algorithms, data, schedules, stopping
from atoll.core.random import Key
from atoll.data import Examples
from atoll.errors import ConfigurationError, DataError
from atoll.learners import Metric, NumpyLearner
from atoll.learners.metrics import add, directions, more_is_better, own_figures, own_sums

CLASSES = 6


def top(k):
    def hits(outputs, targets):
        best = np.argsort(-outputs, axis=1, kind="stable")[:, :k]
        return (best == targets[:, None]).any(axis=1).sum()

    return Metric(hits)


def brier(outputs, targets):
    """Squared errors of probabilities, a sum for each class."""
    shifted = np.exp(outputs.astype(float))
    said = shifted / shifted.sum(axis=1, keepdims=True)
    return np.square(said - np.eye(outputs.shape[1])[targets]).sum(axis=0)


METRICS = {
    "top3": top(3),
    "brier": Metric(lambda o, y: [*brier(o, y), len(y)], lambda s: s[:-1].sum() / s[-1], False),
    "pooled": Metric(lambda o, y: len(y), float, per_client=False),
}


@pytest.fixture(scope="module")
def clients():
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, 300)
    x = rng.normal(size=(300, 8)) + 1.5 * np.eye(8)[y]
    return data.from_arrays(x, y).iid(clients=5, test=0.4)


def numpy_learner():
    return NumpyLearner((8, CLASSES), lr=0.1, metrics=METRICS)


def torch_learner():
    torch = pytest.importorskip("torch")
    from atoll.learners import TorchLearner

    return TorchLearner(torch.nn.Linear(8, CLASSES), lr=0.1, metrics=METRICS)


def jax_learner():
    pytest.importorskip("jax")
    from atoll.learners.jax import JaxLearner, pure

    start = lambda key: {"w": np.eye(8, CLASSES) / 9}  # noqa: E731
    return JaxLearner(pure(start, lambda p, x: x @ p["w"]), lr=0.1, metrics=METRICS)


def sklearn_learner():
    pytest.importorskip("sklearn")
    from sklearn.linear_model import SGDClassifier

    from atoll.learners import SklearnLearner

    return SklearnLearner(SGDClassifier(loss="log_loss"), 8, CLASSES, metrics=METRICS)


@pytest.mark.parametrize("seed", range(5))
def test_any_split_gives_scikit_learns_figures(seed):
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    y, outputs = rng.integers(0, CLASSES, 90), rng.normal(size=(90, CLASSES)).astype(np.float32)
    cuts = np.sort(rng.choice(np.arange(1, 90), rng.integers(0, 9), replace=False))
    pieces = zip(np.split(outputs, cuts), np.split(y, cuts), strict=True)
    found = own_figures(METRICS, add([own_sums(METRICS, *piece) for piece in pieces]))
    wanted = sk.top_k_accuracy_score(y, outputs, k=3, labels=range(CLASSES))
    assert found["top3"] == pytest.approx(wanted, abs=1e-12)
    exps = np.exp(outputs.astype(float))
    squares = np.square(exps / exps.sum(1, keepdims=True) - np.eye(CLASSES)[y]).sum(1)
    assert found["brier"] == pytest.approx(squares.mean(), abs=1e-12)
    assert found["pooled"] == 90


@pytest.mark.parametrize("make", [numpy_learner, torch_learner, jax_learner, sklearn_learner])
def test_every_learner_counts_them(make, clients):
    learner = make()
    model = learner.init(Key(0))
    if make is sklearn_learner:
        model["params"] += np.random.default_rng(0).normal(size=model["params"].shape)
    parts = [clients.test(member) for member in range(5)]
    each = learner.evaluate_each(model, parts, clients.task, CLASSES)
    whole = learner.evaluate(model, clients.test_part, clients.task, CLASSES)
    together = learner.figures(add(each), clients.task)
    x, y = clients.test_part.all()
    outputs = learner.outputs(model, Examples(x, y))
    alone = learner.figures(whole, clients.task)
    for name, value in own_figures(METRICS, own_sums(METRICS, outputs, y)).items():
        assert alone[name] == pytest.approx(value, rel=1e-6)
        assert together[name] == pytest.approx(value, rel=1e-6)
    assert {"loss", "accuracy"} < set(alone)


def test_runs_use_them_and_know_which_way_is_good(clients, tmp_path):
    from atoll.tracking.reading import read_run

    federation = Federation(
        learner=numpy_learner(), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=8, cohort=5),
        evaluation=Evaluation(clients_every=1, spread=("top3", "brier"), best="brier"),
        stop=(stopping.Target("brier", 0.88), stopping.Patience(3, "brier")),
    )  # fmt: skip
    assert [rule.higher for rule in federation.stop] == [False, False]
    run = federation.simulate(clients, folder=tmp_path / "run")
    assert run.stopped.startswith("brier has reached 0.8") and len(run.history) > 1
    _, values = run.series("brier")
    assert values[-1] <= 0.88 < values[-2]
    worst = sorted(run.per_client["brier"].values())[-1]
    assert run.metrics["brier_client_worst"] == pytest.approx(worst)
    assert run.metrics["top3_client_worst"] == min(run.per_client["top3"].values())
    again = read_run(tmp_path / "run")
    own = directions(again.config, again.data)
    assert own == {"top3": True, "brier": False, "pooled": True}
    assert not more_is_better("brier_client_mean", own) and more_is_better("top3", own)
    assert not more_is_better("accuracy_client_std") and not more_is_better("brier_client_std", own)
    assert more_is_better("accuracy_client_worst")
    best = (tmp_path / "run" / "best.safetensors").read_bytes()
    header = json.loads(best[8 : 8 + int.from_bytes(best[:8], "little")])
    about = json.loads(header["__metadata__"]["atoll"])
    assert about["metrics"]["brier"] == min(values)
    pytest.importorskip("matplotlib")
    assert run.plot(tmp_path / "a.png", "brier").exists()
    assert run.plot_spread(tmp_path / "b.png", "brier").exists()


def test_a_figure_that_is_not_defined_is_left_out_of_the_spread(clients):
    rare = Metric(lambda o, y: ((y == 0) & (o.argmax(1) == 0)).sum(), lambda s: math.nan)
    learner = NumpyLearner((8, CLASSES), metrics={"rare": rare})
    run = Federation(
        learner=learner, algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1, cohort=2),
        evaluation=Evaluation(spread=("rare",), clients_every=1),
    ).simulate(clients)  # fmt: skip
    assert math.isnan(run.metrics["rare"]) and "rare_client_mean" not in run.metrics


def test_what_cannot_be_a_metric_is_refused(clients):
    for metrics, said in (
        ({"a b": top(1)}, "cannot be called 'a b'"),
        ({"x_client_mean": top(1)}, "_client_"),
        ({"top": len}, "must be a Metric"),
        ([top(1)], "must be a dict"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            NumpyLearner((8, CLASSES), metrics=metrics)
    federation = Federation(
        learner=numpy_learner(), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1, cohort=2),
    )  # fmt: skip
    for evaluation, said in (
        (Evaluation(spread=("top9",)), "'top9' is not known; use .*brier.*top3"),
        (Evaluation(best="top9"), "'top9' is not known"),
        (Evaluation(spread=("pooled",)), "means nothing on one client"),
    ):
        with pytest.raises(DataError, match=said):
            replace(federation, evaluation=evaluation).simulate(clients)
    named = replace(federation.learner, metrics={"accuracy": top(1)})
    with pytest.raises(DataError, match="'accuracy' is a metric of every classification set"):
        replace(federation, learner=named).simulate(clients)
    text = replace(federation.learner, metrics={"odd": Metric(lambda o, y: "three")})
    with pytest.raises(ConfigurationError, match="sums of metric 'odd' do not become a number"):
        replace(federation, learner=text).simulate(clients)
