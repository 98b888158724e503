"""Multi-label models end to end: three learners, every figure against scikit-learn's."""

import numpy as np
import pytest

from atoll import Evaluation, Federation, algorithms, data, schedules
from atoll.learners import NumpyLearner
from atoll.testing import LEARNER_CHECKS

LABELS = 4


@pytest.fixture(scope="module")
def clients():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.make_multilabel_classification(
        400, n_features=12, n_classes=LABELS, n_labels=2, random_state=0
    )
    return data.from_arrays(np.log1p(x) - 1, y, task="multilabel").lognormal(
        clients=10, sigma=0.5, minimum=5
    )


def numpy_learner():
    return NumpyLearner((12, LABELS), loss="binary_cross_entropy", lr=0.5, batch_size=16)


def torch_learner():
    nn = pytest.importorskip("torch").nn
    from atoll.learners import TorchLearner

    module = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, LABELS))
    return TorchLearner(module, loss="binary_cross_entropy", lr=0.5, batch_size=16)


def jax_learner():
    jax = pytest.importorskip("jax")
    from atoll.learners.jax import JaxLearner, pure

    def start(key):
        return {"w": 0.1 * jax.random.normal(key, (12, LABELS)), "b": np.zeros(LABELS)}

    model = pure(start, lambda p, x: x @ p["w"] + p["b"])
    return JaxLearner(model, loss="binary_cross_entropy", lr=0.5, batch_size=16)


LEARNERS = [numpy_learner, torch_learner, jax_learner]


@pytest.mark.parametrize("check", LEARNER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", LEARNERS)
def test_learner(make, check, clients):
    check(make(), clients)


@pytest.mark.parametrize("make", LEARNERS)
def test_figures_of_a_run_are_scikit_learns(make, clients):
    sk = pytest.importorskip("sklearn.metrics")
    learner = make()
    run = Federation(
        learner=learner, algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=10, cohort=10),
        evaluation=Evaluation(spread=("exact", "macro_f1"), clients_every=10),
    ).simulate(clients, seed=0, engine="sequential(workers=1)")  # fmt: skip
    _, y = clients.test_part.all()
    logits = learner.outputs(run.model, clients.test_part)
    said, found = (logits > 0).astype(int), run.metrics
    chances = 1 / (1 + np.exp(-logits.astype(float)))
    losses = [sk.log_loss(y[:, k], chances[:, k], labels=[0, 1]) for k in range(LABELS)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(1 - sk.hamming_loss(y, said))
    assert found["exact"] == pytest.approx(sk.accuracy_score(y, said))
    for average in ("micro", "macro"):
        wanted = sk.f1_score(y, said, average=average)
        assert found[f"{average}_f1"] == pytest.approx(wanted)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(y, chances), abs=2e-3)
    # More than the commonest answer of each label is right, and the spread is of clients' own.
    assert found["accuracy"] > np.maximum(y.mean(0), 1 - y.mean(0)).mean() + 0.02
    alone = []
    for member in range(len(clients)):
        mine = clients.test(member)
        given = mine.all()[1], learner.outputs(run.model, mine) > 0
        alone.append(sk.accuracy_score(*given))
    assert found["exact_client_mean"] == pytest.approx(np.mean(alone))
    assert found["exact_client_worst"] == pytest.approx(min(alone))


def test_two_workers_and_stacks_agree(clients):
    federation = Federation(
        learner=torch_learner(), algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=2, cohort=6),
    )  # fmt: skip
    one, two, stack = (
        federation.simulate(clients, seed=1, engine=engine)
        for engine in (
            "sequential(workers=1)", "sequential(workers=2)",
            "stacked(block=3, workers=1, threads=1)",
        )
    )  # fmt: skip
    assert one.model["params"].tobytes() == two.model["params"].tobytes()
    np.testing.assert_allclose(stack.model["params"], one.model["params"], rtol=1e-3, atol=1e-5)
