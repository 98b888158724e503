"""Saved models: a fresh process without atoll opens them, and says the same to the last bits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from atoll import Federation, data, schedules
from atoll.algorithms import FedAvg
from atoll.core.model_file import load_model, save_model
from atoll.core.vectors import Layout
from atoll.errors import CheckpointError, ConfigurationError, DataError
from atoll.learners import NumpyLearner, SklearnLearner
from atoll.learners.prediction import predict
from atoll.tracking.reading import read_run

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64)


@pytest.fixture
def clients():
    return data.from_arrays(X, Y, classes=2, class_names=("no", "yes")).iid(clients=3)


def ran(learner, clients, folder=None):
    plan = Federation(learner=learner, algorithm=FedAvg(), schedule=schedules.Synchronous(rounds=3))
    return plan, plan.simulate(clients, folder=folder)


def without_atoll(code, *arguments):
    """What a fresh process prints that cannot import atoll."""
    blocked = "import sys; sys.modules['atoll'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def torch_run(clients, tmp_path):
    pytest.importorskip("torch")
    from torch import nn

    from atoll.learners import TorchLearner

    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    plan, run = ran(TorchLearner(net, lr=0.1, batch_size=10), clients, tmp_path / "run")
    return plan, run, plan.learner.outputs(run.model, data.Examples(X, Y))


TORCH = """
import json, sys
import numpy as np, torch
from torch import nn
net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
path, x = sys.argv[1], torch.from_numpy(np.load(sys.argv[2]))
if path.endswith(".pt"):
    state = torch.load(path)
elif path.endswith(".npz"):
    state = {n: torch.from_numpy(a) for n, a in np.load(path).items()}
else:
    from safetensors.torch import load_file
    state = load_file(path)
net.load_state_dict(state)
with torch.no_grad():
    print(json.dumps(net.eval()(x).tolist()))
"""


@pytest.mark.parametrize("ending", ["safetensors", "pt", "npz"])
def test_torch_loads_it_strictly_without_atoll(torch_run, tmp_path, ending):
    _, run, outputs = torch_run
    np.save(tmp_path / "x.npy", X)
    path = run.save(tmp_path / f"model.{ending}")
    found = without_atoll(TORCH, path, tmp_path / "x.npy")
    np.testing.assert_allclose(np.float32(found), outputs, rtol=1e-6, atol=1e-6)


def test_onnx_runs_without_torch(torch_run, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    plan, run, outputs = torch_run
    np.save(tmp_path / "x.npy", X)
    path = run.save(tmp_path / "model.onnx")
    found = without_atoll(
        "sys.modules['torch'] = None\nimport json, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\nx = numpy.load(sys.argv[2])\n"
        "print(json.dumps(session.run(['output'], {'input': x})[0].tolist()))",
        path, tmp_path / "x.npy",
    )  # fmt: skip
    np.testing.assert_allclose(np.float32(found), outputs, rtol=1e-4, atol=1e-5)
    # The module that was exported is the learner's, as it was.
    np.testing.assert_array_equal(plan.learner.outputs(run.model, data.Examples(X, Y)), outputs)


def test_scikit_learns_coefficients_by_their_names(clients, tmp_path):
    linear = pytest.importorskip("sklearn.linear_model")
    learner = SklearnLearner(linear.SGDClassifier(loss="log_loss"), features=4, classes=2)
    _, run = ran(learner, clients)
    arrays = np.load(run.save(tmp_path / "model.npz"))
    assert set(arrays) == {"coef_", "intercept_"}
    estimator = linear.SGDClassifier(loss="log_loss")
    estimator.coef_, estimator.intercept_ = arrays["coef_"], arrays["intercept_"]
    estimator.classes_ = np.arange(2)
    found = predict(learner, run.model, X, "classification", 2)
    np.testing.assert_allclose(found.probabilities, estimator.predict_proba(X), atol=1e-6)
    assert found.values.tolist() == estimator.predict(X).tolist()


def test_jax_arrays_by_their_paths(clients, tmp_path):
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    from atoll.learners import JaxLearner
    from atoll.learners.jax import pure

    def init(key):
        return {"dense": {"kernel": jax.random.normal(key, (4, 2)), "bias": jax.numpy.zeros(2)}}

    def apply(params, x):
        return x @ params["dense"]["kernel"] + params["dense"]["bias"]

    plan, run = ran(JaxLearner(pure(init, apply), lr=0.1, batch_size=10), clients)
    arrays = load_model(run.save(tmp_path / "model.safetensors")).arrays
    assert set(arrays) == {"dense.kernel", "dense.bias"}
    outputs = X @ arrays["dense.kernel"] + arrays["dense.bias"]
    np.testing.assert_allclose(
        plan.learner.outputs(run.model, data.Examples(X, Y)), outputs, rtol=1e-4, atol=1e-5
    )


def test_the_file_says_what_it_is_of(clients, tmp_path):
    plan, run = ran(NumpyLearner([4, 2], lr=0.1, batch_size=10), clients, tmp_path / "run")
    for kept in (run.saved(), load_model(tmp_path / "run" / "model.safetensors"),
                 load_model(run.save(tmp_path / "m.safetensors"))):  # fmt: skip
        assert kept.about["round"] == 3
        assert kept.about["metrics"]["accuracy"] == run.metrics["accuracy"]
        assert (kept.about["task"], kept.about["classes"]) == ("classification", 2)
        assert kept.about["class_names"] == ["no", "yes"]
        assert kept.layout == plan.learner.layout
        np.testing.assert_array_equal(kept.vectors["params"], run.model["params"])
    again = read_run(tmp_path / "run")
    np.testing.assert_array_equal(
        load_model(again.save(tmp_path / "again.safetensors")).vectors["params"],
        run.model["params"],
    )
    best = load_model(again.save(tmp_path / "best.safetensors", best=True))
    assert best.about["round"] == run.best()[0]


def test_predictions_are_of_whatever_one_has(clients, tmp_path):
    plan, run = ran(NumpyLearner([4, 2], lr=0.1, batch_size=10), clients, tmp_path / "run")
    wanted = plan.learner.outputs(run.model, data.Examples(X, Y))
    raised = np.exp(wanted.astype(np.float64))
    for model in (run, tmp_path / "run", run.save(tmp_path / "m.safetensors")):
        found = plan.predict(model, X)
        np.testing.assert_allclose(found.probabilities, raised / raised.sum(1, keepdims=True))
        assert found.values.tolist() == wanted.argmax(1).tolist()
        assert found.labels == [("no", "yes")[each] for each in found.values]
    other = Federation(
        learner=NumpyLearner([4, 3, 2], lr=0.1, batch_size=10), algorithm=FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="does not fit the model"):
        other.predict(run, X)


def test_amounts_are_told_as_they_are(tmp_path):
    amounts = (X @ np.float32([1, 2, 3, 4]))[:, None]
    clients = data.from_arrays(X, amounts).iid(clients=3)
    plan, run = ran(NumpyLearner([4, 1], lr=0.01, batch_size=10, loss="squared"), clients)
    found = plan.predict(run, X)
    assert found.probabilities is None
    outputs = plan.learner.outputs(run.model, data.Examples(X, amounts))
    np.testing.assert_array_equal(found.values, outputs[:, 0])


@pytest.mark.parametrize("ending", ["pickle", "", "joblib", "h5"])
def test_other_endings_are_refused_with_a_sentence(clients, tmp_path, ending):
    _, run = ran(NumpyLearner([4, 2], lr=0.1, batch_size=10), clients)
    with pytest.raises(ConfigurationError, match="a model is saved as .safetensors, .npz"):
        run.save(tmp_path / f"model.{ending}" if ending else tmp_path / "model")
    with pytest.raises(ConfigurationError, match="NumpyLearner cannot be written as .onnx"):
        run.save(tmp_path / "model.onnx")


def test_a_damaged_file_is_refused(clients, tmp_path):
    _, run = ran(NumpyLearner([4, 2], lr=0.1, batch_size=10), clients)
    path = run.save(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = load_model(path)
        except CheckpointError:
            continue
        # A letter of what it is about, which no digest covers.
        np.testing.assert_array_equal(found.arrays["0.weight"], run.saved().arrays["0.weight"])
    layout = Layout.of({"a": np.zeros((2, 3), np.float32)}, {"n": np.zeros((), np.int64)})
    model = {"params": np.arange(6, dtype=np.float32), "counters": np.int64([7])}
    save_model(path, model, layout, {"round": 1})
    found = load_model(path)
    assert found.arrays["a"].shape == (2, 3)
    assert found.arrays["n"].shape == ()
    assert found.layout == layout
    save_model(path, model, replace(layout, entries=layout.entries[::-1]), {})
    assert load_model(path).vectors["params"].tolist() == model["params"].tolist()


def test_other_frozen_weights_are_refused(clients, tmp_path):
    torch = pytest.importorskip("torch")
    from torch import nn

    from atoll.learners import TorchLearner

    def plan(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 2))
        return TorchLearner(net, lr=0.1, batch_size=10, weights="given")

    one, run = ran(plan(0), clients)
    path = run.save(tmp_path / "m.safetensors")
    other, _ = ran(plan(1), clients)
    with pytest.raises(ConfigurationError, match="beside other frozen weights"):
        other.predict(path, X)
    # Where it starts from is another matter.
    torch.manual_seed(5)
    again = plan(0)
    with torch.no_grad():
        again.module[2].weight.add_(1)
    same, _ = ran(again, clients)
    assert same.predict(path, X).values.tolist() == one.predict(run, X).values.tolist()


def test_probabilities_are_those_of_the_row_alone(clients):
    torch = pytest.importorskip("torch")
    from torch import nn

    from atoll.learners import TorchLearner

    net = nn.Sequential(nn.Linear(4, 2), nn.Softmax(1))
    loss = lambda outputs, y: nn.functional.nll_loss(torch.log(outputs + 1e-9), y)  # noqa: E731
    plan, run = ran(TorchLearner(net, lr=0.1, batch_size=10, loss=loss), clients)
    whole = plan.predict(run, X).probabilities
    np.testing.assert_allclose(
        whole, plan.learner.outputs(run.model, data.Examples(X, Y)), rtol=1e-6
    )
    for row in range(5):
        np.testing.assert_allclose(plan.predict(run, X[row : row + 1]).probabilities[0], whole[row])
    logits = nn.Linear(4, 2)
    plan, run = ran(TorchLearner(logits, lr=0.1, batch_size=10), clients)
    whole = plan.predict(run, X).probabilities
    for row in range(len(X)):
        alone = plan.predict(run, X[row : row + 1]).probabilities[0]
        np.testing.assert_allclose(alone, whole[row], rtol=1e-5)


def test_a_single_output_beyond_its_bounds_is_a_probability_still(clients):
    pytest.importorskip("torch")
    from torch import nn

    from atoll.learners import TorchLearner

    loss = lambda outputs, y: ((outputs.squeeze(1) - y) ** 2).mean()  # noqa: E731
    plan, run = ran(TorchLearner(nn.Linear(4, 1), lr=0.1, batch_size=10, loss=loss), clients)
    found = plan.predict(run, 10 * X).probabilities
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("wrong", [X[:, :3], X[0], X[:0], X.tolist()[0], np.full((2, 4), np.nan)])
def test_inputs_that_do_not_fit_are_a_sentence(clients, wrong):
    plan, run = ran(NumpyLearner([4, 2], lr=0.1, batch_size=10), clients)
    with pytest.raises(ConfigurationError):
        plan.predict(run, wrong)


def test_many_classes_are_decided_as_scikit_learn_decides(tmp_path):
    linear = pytest.importorskip("sklearn.linear_model")
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = x.astype(np.float32)
    estimator = linear.SGDClassifier(loss="log_loss", random_state=0)
    plan = Federation(
        learner=SklearnLearner(estimator, features=64, classes=10), algorithm=FedAvg(),
        schedule=schedules.Synchronous(rounds=3),
    )  # fmt: skip
    clients = data.from_arrays(x, y).iid(clients=3)
    run = plan.simulate(clients)
    theirs = run.load_into(linear.SGDClassifier(loss="log_loss"))
    assert (plan.predict(run, x).values != theirs.predict(x)).sum() == 0
    test = clients.test_part.all()
    assert run.metrics["accuracy"] == pytest.approx(theirs.score(*test))


def test_labels_of_several_and_amounts(tmp_path):
    torch = pytest.importorskip("torch")
    from torch import nn

    from atoll.learners import TorchLearner

    torch.manual_seed(0)
    topics = np.stack([X[:, 0] > 0, X[:, 1] > 0], axis=1)
    clients = data.from_arrays(X, topics, task="multilabel", class_names=("a", "b")).iid(clients=3)
    learner = TorchLearner(nn.Linear(4, 2), lr=0.5, batch_size=10, loss="binary_cross_entropy")
    plan, run = ran(learner, clients)
    found = plan.predict(run, X[:20])
    for row, label in zip(found.values, found.labels, strict=True):
        assert label == ", ".join(name for name, holds in zip("ab", row, strict=True) if holds)


def test_a_file_of_no_sense_is_a_sentence(clients, tmp_path):
    plan, run = ran(NumpyLearner([4, 2], lr=0.1, batch_size=10), clients)
    kept = run.saved()
    for wrong in ({"class_names": 5}, {"classes": 10**12}, {"task": "magic"}, {"encoding": 3},
                  {"class_names": ["a"]}, {"classes": "x"}):  # fmt: skip
        path = tmp_path / "odd.safetensors"
        save_model(path, kept.vectors, kept.layout, {**kept.about, **wrong})
        with pytest.raises((ConfigurationError, DataError)):
            plan.predict(path, X)
    with pytest.raises(ConfigurationError, match="there is no folder"):
        run.save(tmp_path / "nowhere" / "m.safetensors")
