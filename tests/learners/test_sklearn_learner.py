import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.core.random import Key
from atoll.errors import ConfigurationError
from atoll.learners import Assignment

pytest.importorskip("sklearn")
from sklearn.linear_model import (
    Lasso,
    LinearRegression,
    LogisticRegression,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.neural_network import MLPClassifier
from sklearn.tree import DecisionTreeClassifier

from atoll.learners import SklearnLearner


@pytest.mark.parametrize(
    ("estimator", "epochs", "target"),
    [
        (SGDClassifier(loss="log_loss", alpha=1e-3), 3, 0.85),
        (LogisticRegression(), 5, 0.88),
        (MLPClassifier((32,), learning_rate_init=0.01), 3, 0.7),
    ],
)
def test_estimators_learn_together_what_none_knows_alone(digits, estimator, epochs, target):
    learner = SklearnLearner(estimator, features=64, classes=10, epochs=epochs)
    federation = Federation(
        learner=learner,
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=15),
    )
    result = federation.simulate(digits, seed=0)
    assert result.metrics["accuracy"] > target
    again = federation.simulate(digits, seed=0)
    np.testing.assert_array_equal(again.model["params"], result.model["params"])


def test_one_full_client_is_plain_scikit_learn(digits):
    x, y = digits.all_train().all()
    learner = SklearnLearner(LogisticRegression(), features=64, classes=10, epochs=200)
    local = learner.train(learner.init(Key(0)), digits.all_train(), Assignment(1, Key(0)))
    plain = LogisticRegression(max_iter=200).fit(x, y)
    coefficients = learner.layout.unpack({"params": local.params})
    np.testing.assert_allclose(coefficients["coef_"], plain.coef_, atol=2e-2)
    evaluated = learner.evaluate({"params": local.params}, digits.test_part, "classification", 10)
    expected = plain.score(*digits.test_part.all())
    assert float(evaluated["correct"] / evaluated["count"]) == pytest.approx(expected, abs=0.01)


def test_regressors():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)).astype(np.float32)
    y = (x @ [1.0, -2.0, 0.5] + 1).astype(np.float32)
    clients = data.from_arrays(x, y, task="regression").iid(clients=5)
    federation = Federation(
        learner=SklearnLearner(SGDRegressor(), features=3, epochs=3),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=20),
    )
    assert federation.simulate(clients).metrics["r2"] > 0.99


def test_black_boxes_are_refused_where_gradients_are_needed():
    learner = SklearnLearner(SGDClassifier(), features=2, classes=2)
    for algorithm in (algorithms.FedProx(mu=0.1), algorithms.Scaffold(), algorithms.FedSGD(lr=1.0)):
        with pytest.raises(ConfigurationError, match="SklearnLearner cannot do that"):
            Federation(
                learner=learner, algorithm=algorithm, schedule=schedules.Synchronous(rounds=1)
            )


@pytest.mark.parametrize(
    "estimator",
    [SGDClassifier(average=True), LogisticRegression(solver="liblinear")],
)
def test_estimators_that_ignore_where_they_start_are_refused(estimator):
    with pytest.raises(ConfigurationError, match="cannot take part in rounds"):
        SklearnLearner(estimator, features=2, classes=2)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_the_first_turn_of_a_perceptron_is_plain_scikit_learn(digits, solver):
    settings = {"solver": solver, "learning_rate_init": 0.01}
    learner = SklearnLearner(MLPClassifier((8,), **settings), features=64, classes=10)
    model = learner.init(Key(0))
    held = digits.train(0)
    local = learner.train(model, held, Assignment(1, Key(1)))
    plain = MLPClassifier((8,), random_state=0, **settings)
    order = Key(1).fold("order").generator().permutation(len(held))
    x, y = held.all()
    plain.partial_fit(x[:1], y[:1], classes=np.arange(10))
    for number, (coef, intercept) in enumerate(zip(plain.coefs_, plain.intercepts_, strict=True)):
        arrays = learner.layout.unpack(model)
        coef[...], intercept[...] = arrays[f"coefs_.{number}"], arrays[f"intercepts_.{number}"]
    del plain._optimizer
    plain._random_state = np.random.RandomState(Key(1).fold("batches").integer() % 2**32)
    plain.partial_fit(x[order], y[order])
    expected = np.concatenate(
        [a.ravel() for pair in zip(plain.coefs_, plain.intercepts_, strict=True) for a in pair]
    )
    np.testing.assert_allclose(local.params, expected, rtol=1e-4, atol=1e-6)


def test_scalar_intercepts_travel_too():
    lasso = SklearnLearner(Lasso(alpha=0.001), features=3, epochs=1)
    assert lasso.layout["intercept_"].shape == (1,)


def test_estimators_that_cannot_go_on_are_refused():
    with pytest.raises(ConfigurationError, match="neither partial_fit nor warm_start"):
        SklearnLearner(LinearRegression(), features=2)
    with pytest.raises(ConfigurationError, match="neither partial_fit nor warm_start"):
        SklearnLearner(DecisionTreeClassifier(), features=2, classes=2)
    with pytest.raises(ConfigurationError, match="give classes"):
        SklearnLearner(SGDClassifier(), features=2)


@pytest.mark.parametrize("kind", ["SGDClassifier", "LogisticRegression", "Perceptron"])
def test_weights_of_classes_are_agreed_on_and_not_each_clients_own(kind):
    import sklearn.linear_model as models

    from atoll.errors import ConfigurationError

    more = {"warm_start": True} if kind == "LogisticRegression" else {}
    with pytest.raises(ConfigurationError, match="agree on numbers"):
        SklearnLearner(
            getattr(models, kind)(class_weight="balanced", **more), features=3, classes=2
        )
    SklearnLearner(getattr(models, kind)(class_weight={0: 1, 1: 3}, **more), features=3, classes=2)
