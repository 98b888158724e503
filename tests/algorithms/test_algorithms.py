"""Algorithms against their papers: fixed points, formulas, and plain reference implementations."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from atoll import Federation, algorithms, data, schedules
from atoll.aggregation import Clip, Mean
from atoll.algorithms import FedAvg, LocalRule, Start, server
from atoll.algorithms.local import Proximal
from atoll.algorithms.scaffold import ControlVariates
from atoll.core.random import Key, permutations
from atoll.core.updates import Aggregate
from atoll.core.vectors import Layout
from atoll.data import Examples
from atoll.errors import ConfigurationError
from atoll.learners import Affine, GradientLearner, LocalResult, NumpyLearner
from atoll.learners.metrics import regression_sums


@dataclass(frozen=True, eq=False)
class Quadratic(GradientLearner):
    """Clients minimise f(x) = a / 2 (x - b)^2; a client's one example is (a, b)."""

    plain_sgd = True
    start: float = 0.0

    @property
    def layout(self):
        return Layout.of({"x": np.zeros(1, np.float32)})

    def init(self, key):
        return {"params": np.full(1, self.start, np.float32)}

    @contextmanager
    def descend(self, model, examples, key):
        class Descent:
            params = model["params"].copy()

            def gather(self, rows):
                self.a, self.b = examples.x[rows].T

            def gradient(self, batch):
                error = self.params - self.b[batch]
                gradient = np.mean(self.a[batch] * error, keepdims=True).astype(np.float32)
                return gradient, float(np.mean(self.a[batch] / 2 * error**2))

            def step(self, direction, lr, again=None):
                self.params -= np.float32(lr) * direction

            def result(self):
                return self.params, {}

        yield Descent()

    def norm(self, vector):
        return float(np.abs(vector).max())

    def evaluate(self, model, examples, task, classes):
        y = examples.all()[1]
        return regression_sums(np.full(len(y), model["params"][0]), y, 0.0)


A, B, LR, STEPS = np.array([1.0, 4.0]), np.array([0.0, 5.0]), 0.05, 10
TWO = {f"{a}": (np.array([[a, b]]), np.array([b])) for a, b in zip(A, B, strict=True)}


def converge(algorithm, rounds=400, pipeline=None, steps=STEPS):
    clients = data.from_clients(TWO, task="regression", test=0.0)
    federation = Federation(
        learner=Quadratic(lr=LR, steps=steps, batch_size=None),
        algorithm=algorithm,
        schedule=schedules.Synchronous(rounds=rounds),
        pipeline=pipeline or Mean(),
    )
    return float(federation.simulate(clients).model["params"][0])


def fixed_point_of_fedprox(mu):
    """x = mean of c + rho^K (x - c), with c = (a b + mu x) / (a + mu), rho = 1 - lr (a + mu)."""
    shrink = (1 - LR * (A + mu)) ** STEPS
    pull, share = A * B / (A + mu), mu / (A + mu)
    # x = mean(pull (1 - shrink)) + x * mean(share (1 - shrink) + shrink)
    return (pull * (1 - shrink)).mean() / (1 - (share * (1 - shrink) + shrink).mean())


def test_fedavg_stops_at_its_biased_fixed_point():
    shrink = (1 - LR * A) ** STEPS
    expected = ((1 - shrink) * B).sum() / (1 - shrink).sum()
    assert expected == pytest.approx(3.449391, abs=1e-6)
    assert converge(algorithms.FedAvg()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_finds_the_optimum(option):
    assert converge(algorithms.Scaffold(option=option)) == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0, 10.0])
def test_fedprox_stops_at_its_closed_form(mu):
    rounds = 400 if mu < 5 else 3000
    assert converge(algorithms.FedProx(mu=mu), rounds) == pytest.approx(
        fixed_point_of_fedprox(mu), abs=1e-5
    )


def test_fedsgd_is_gradient_descent_and_finds_the_optimum():
    assert converge(algorithms.FedSGD(lr=0.1)) == pytest.approx(4.0, abs=1e-5)
    x = 0.0
    for _ in range(7):
        x -= 0.1 * (A * (x - B)).mean()
    assert converge(algorithms.FedSGD(lr=0.1), rounds=7) == pytest.approx(x, abs=1e-5)


def test_one_local_step_of_fedavg_is_fedsgd():
    assert converge(algorithms.FedAvg(), 9, steps=1) == pytest.approx(
        converge(algorithms.FedSGD(lr=LR), 9), abs=1e-6
    )


def test_server_momentum_keeps_the_fixed_point():
    assert converge(algorithms.FedAvgM(momentum=0.5)) == pytest.approx(3.449391, abs=1e-5)


def test_clipping_bounds_what_a_round_can_move():
    # At x = 0 the first client stands still and the second moves by the norm.
    assert converge(algorithms.FedAvg(), 1, Clip(0.01) >> Mean()) == pytest.approx(0.005, abs=1e-6)


def start(params):
    """What an algorithm's first state is made from, without a learner."""
    return Start(params, None, Layout.of({"x": params}), Key(0))


def mean_change(delta):
    return Aggregate({"delta": np.array([delta], np.float32)}, {}, 1.0, 1, 1)


# Reddi et al., algorithm 2, written out for one coordinate in float64.
def reference_fedopt(rule, deltas, lr, beta1, beta2, tau):
    x, m, v = 1.0, 0.0, tau**2
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + lr * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    ("rule", "algorithm"),
    [
        ("adagrad", algorithms.FedAdagrad(server_lr=0.3, beta1=0.2, tau=0.01)),
        ("adam", algorithms.FedAdam(server_lr=0.3, beta1=0.9, beta2=0.99, tau=0.01)),
        ("yogi", algorithms.FedYogi(server_lr=0.3, beta1=0.9, beta2=0.99, tau=0.01)),
    ],
)
def test_server_optimisers_are_the_papers(rule, algorithm):
    deltas = np.random.default_rng(0).normal(0, 0.5, 12)
    state = algorithm.init(start(np.ones(1, np.float32)))
    for delta in deltas:
        state = algorithm.step(state, mean_change(delta), None)
        assert all(vector.dtype == np.float32 for vector in state.values())
    optimizer = algorithm.server
    expected = reference_fedopt(
        rule, deltas, 0.3, optimizer.beta1, getattr(optimizer, "beta2", 0), 0.01
    )
    assert state["params"][0] == pytest.approx(expected, rel=1e-5)


def test_fedavgm_is_the_papers():
    algorithm = algorithms.FedAvgM(momentum=0.9, server_lr=0.5)
    state, x, v = algorithm.init(start(np.zeros(1, np.float32))), 0.0, 0.0
    for delta in (1.0, -0.5, 0.25):
        state = algorithm.step(state, mean_change(delta), None)
        v = 0.9 * v + delta
        x += 0.5 * v
    assert state["params"][0] == pytest.approx(x)


def reference_scaffold(clients, learner, rounds, cohort, option, step=lambda x, d: x + d):
    """Karimireddy et al., algorithm 1, on plain arrays with hand-written loops and gradients.

    `step` is what the server makes of the mean change.
    """
    key = Key(0)
    x = learner.init(key.fold("init"))["params"].astype(np.float64)
    c, own = np.zeros_like(x), np.zeros((len(clients), len(x)))

    def gradient(params, held, rows):
        weight, bias = params[:6].reshape(2, 3), params[6:]
        logits = held.x[rows] @ weight + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), held.y[rows]] -= 1
        return np.concatenate([(held.x[rows].T @ p).ravel(), p.sum(0)]) / len(rows)

    for round in range(1, rounds + 1):
        drawn = schedules.Uniform().draw(
            roster(clients), cohort, round, key.fold("cohort", round, 0)
        )
        deltas, changes = [], []
        for i in drawn:
            held, y, steps = clients.train(int(i)), x.copy(), 0
            word = key.fold("work", round, clients.names[i]).fold("batches").integer()
            permutation = held.at(permutations([word], len(held), 1)[0, 0])
            for start in range(0, len(held), 10):
                y -= 0.1 * (gradient(y, held, permutation[start : start + 10]) - own[i] + c)
                steps += 1
            new = own[i] - c + (x - y) / (steps * 0.1)
            if option == "I":
                new = gradient(x, held, held.at(slice(None)))
            deltas.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = step(x, np.mean(deltas, axis=0))
        c = c + cohort / len(clients) * np.mean(changes, axis=0)
    return x


def roster(clients):
    from atoll.rounds import Roster

    return Roster(clients.names, clients.sizes())


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_is_the_papers_algorithm_under_sampling(blobs, option):
    learner = NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10)
    federation = Federation(
        learner=learner,
        algorithm=algorithms.Scaffold(option=option),
        schedule=schedules.Synchronous(rounds=8, cohort=3),
    )
    result = federation.simulate(blobs, seed=0)
    expected = reference_scaffold(blobs, learner, 8, 3, option)
    np.testing.assert_allclose(result.model["params"], expected, rtol=1e-4, atol=1e-5)


class AdamByHand:
    """Reddi et al., algorithm 2 with line 11, in float64."""

    def __init__(self, lr, beta1, beta2, tau):
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau
        self.m, self.v = 0.0, tau**2

    def __call__(self, x, delta):
        self.m = self.beta1 * self.m + (1 - self.beta1) * delta
        self.v = self.beta2 * self.v + (1 - self.beta2) * delta**2
        return x + self.lr * self.m / (np.sqrt(self.v) + self.tau)


@pytest.mark.parametrize("option", ["I", "II"])
def test_control_variates_under_adam_are_both(blobs, option):
    """Scaffold's clients and control, with FedAdam's step: each part as in its own paper."""
    learner = NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10)
    numbers = {"lr": 0.05, "beta1": 0.9, "beta2": 0.99, "tau": 0.01}
    plan = Federation(
        learner=learner,
        algorithm=FedAvg(
            local=ControlVariates(option), server=server.Adam(**numbers), weighting="uniform"
        ),
        schedule=schedules.Synchronous(rounds=8, cohort=3),
    )
    found = plan.simulate(blobs, seed=0).model["params"]
    expected = reference_scaffold(blobs, learner, 8, 3, option, AdamByHand(**numbers))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Neither half is left out: the other compositions end elsewhere.
    for other in (algorithms.Scaffold(option=option), FedAvg(server=server.Adam(**numbers))):
        ends = Federation(learner=learner, algorithm=other, schedule=plan.schedule).simulate(blobs)
        assert np.abs(ends.model["params"] - expected).max() > 1e-2


def test_control_variates_stay_the_mean_of_the_clients():
    # Invariant of the paper: c = mean of all c_i, whoever took part.
    from atoll.simulation import Devices, Sequential, Simulator
    from atoll.tracking import Run

    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)).astype(np.float32)
    clients = data.from_arrays(x, rng.integers(0, 3, 200), classes=3).dirichlet(
        clients=9, alpha=0.3
    )
    federation = Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=algorithms.Scaffold(),
        schedule=schedules.Synchronous(rounds=5, cohort=4),
    )
    simulator = Simulator(
        federation, clients, Run(federation.describe(), clients.summary(), 0, 5),
        devices=Devices(), engine=Sequential(), observers=[],
    )  # fmt: skip
    simulator.go()
    total = sum(kept["algorithm/control"] for _, kept in simulator.states.values())
    assert 4 <= len(simulator.states) <= 9
    control = simulator.driver.server.state["local.control"]
    assert np.abs(control).max() > 1e-3
    np.testing.assert_allclose(control, total / 9, atol=1e-6)


@pytest.mark.parametrize("rule", [Proximal(mu=0.3), ControlVariates()])
def test_rules_serve_one_client_and_a_stacked_cohort_alike(rule):
    rng = np.random.default_rng(0)
    cohort, size = 4, 6
    got = {name: rng.normal(size=size).astype(np.float32) for name in ("params", "control")}
    controls, gradients, params = rng.normal(size=(3, cohort, size)).astype(np.float32)
    stacked = rule.correction(got, {"control": controls})(gradients.copy(), params)
    tens = np.full((cohort, 1), 10)
    local = LocalResult(
        params, tens / 2, np.full((cohort, 1), 0.5, np.float32), tens, tens, np.zeros((cohort, 1))
    )
    vectors, memory = rule.finish(None, local, got, {"control": controls})
    for row in range(cohort):
        mine = {"control": controls[row]}
        alone = rule.correction(got, mine)(gradients[row].copy(), params[row])
        np.testing.assert_allclose(stacked[row], alone, rtol=1e-6)
        one, kept = rule.finish(None, LocalResult(params[row], 5, 0.5, 10, 10, 0.0), got, mine)
        assert one.keys() == vectors.keys()
        for name, vector in one.items():
            np.testing.assert_allclose(vectors[name][row], vector, rtol=1e-6)
        np.testing.assert_allclose(memory["control"][row], kept["control"], rtol=1e-6)


@dataclass(frozen=True)
class WeightDecayed(LocalRule):
    decay: float
    needs = frozenset({"gradient"})

    def correction(self, got, mine):
        return Affine(scale=self.decay)


def test_a_new_algorithm_is_one_class():
    # LocalResult points shrink towards zero: c_i = a b / (a + decay).
    shrink = (1 - LR * (A + 1.0)) ** STEPS
    expected = ((1 - shrink) * A * B / (A + 1)).sum() / (1 - shrink).sum()
    assert converge(FedAvg(local=WeightDecayed(1.0))) == pytest.approx(expected, abs=1e-5)


def test_a_rule_that_would_never_be_called_is_refused():
    """What belongs into a local rule is written into the algorithm: found when it is defined."""
    for name in ("correction", "finish", "objective"):
        with pytest.raises(ConfigurationError, match=f"Mine.{name} would never be called"):
            type("Mine", (FedAvg,), {name: lambda self, *given: None})


def test_weighting_by_work_counts_partial_work():
    local = LocalResult(np.zeros(1), 3, 0.3, examples=20, seen=30, loss=0.0)
    weights = [
        algorithms.FedAvg(weighting=w).report(local, delta=np.zeros(1)).weight
        for w in ("examples", "uniform", "work")
    ]
    assert weights == [20, 1, 30]
    assert [algorithms.FedAvg(weighting=w).weighted for w in ("examples", "uniform", "work")] == [
        True, False, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: algorithms.FedAvg(weighting="size"), "weighting must be"),
        (lambda: algorithms.FedAvg(server=server.SGD(0)), "lr must be positive"),
        (lambda: algorithms.FedAdam(beta2=1.0), "beta2 must be"),
        (lambda: algorithms.FedAvgM(momentum=1.0), "momentum must be"),
        (
            lambda: Federation(
                learner=NumpyLearner(layers=(2, 3), momentum=0.9),
                algorithm=algorithms.Scaffold(),
                schedule=schedules.Synchronous(rounds=1),
            ),
            "use Scaffold.option='I'.",
        ),
        (
            lambda: Federation(
                learner=NumpyLearner(layers=(2, 3)),
                algorithm=algorithms.FedAvg,
                schedule=schedules.Synchronous(rounds=1),
            ),
            "call it to make one",
        ),
    ],
)
def test_bad_settings_get_a_sentence(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_examples_stay_where_they_are():
    """The update of a client holds nothing but what its algorithm reports."""
    from atoll.learners.base import Assignment
    from atoll.rounds.task import ClientTask, Received, first_state, run_task

    federation = Federation(
        learner=NumpyLearner(layers=(2, 3)),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1),
    )
    received = Received({"params": federation.learner.init(Key(0))["params"]})
    held = Examples(np.ones((4, 2), np.float32), np.zeros(4, np.int64))
    state = first_state(federation, received, {})
    task = ClientTask(0, "a", Assignment(1, Key(1)), state)
    update, kept = run_task(federation, received, task, held)
    assert set(update.vectors) == {"delta"}
    assert update.vectors["delta"].shape == (9,)
    assert set(update.metrics) == {"train_loss", "steps", "seen"}
    assert update.statistics == {} and update.weight == 4
    assert state == {} and kept == {}
