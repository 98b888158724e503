"""Checks that every learner must pass, atoll's own and other people's.

    import pytest
    from atoll.testing import LEARNER_CHECKS

    @pytest.mark.parametrize("check", LEARNER_CHECKS, ids=lambda check: check.__name__)
    def test_my_learner(check):
        check(MyLearner(...), clients)

`clients` is a small `FederatedData` of two or more clients of different sizes, which the learner
fits. A check passes, or raises `AssertionError` with a sentence. What a learner does not offer
(its `abilities`, stacks) is not asked of it. Expected values come from finite differences, from
sums and from the loop that the documentation promises, never from the learner alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.fedavg import FedAvg
from atoll.core.random import Key, permutations
from atoll.core.vectors import Vectors
from atoll.data.examples import Examples, columns_of, joined, of_each
from atoll.data.federated import FederatedData
from atoll.data.tasks import Classification
from atoll.errors import ConfigurationError, DataError
from atoll.federation import Federation
from atoll.learners.base import (
    Affine,
    Assignment,
    At,
    GradientLearner,
    Learner,
    LocalResult,
    Objective,
    stacking,
)
from atoll.learners.rates import Exponential, rate_at
from atoll.rounds.describe import describe
from atoll.rounds.schedules import Synchronous

Check = Callable[[Learner, FederatedData], None]

#: Relative difference that float32 may make between two ways of computing the same.
NEAR = 1e-4


def init_fits_the_layout_and_the_seed(learner: Learner, clients: FederatedData) -> None:
    """The initial model has the layout's sections, and one key gives one model."""
    model = learner.init(Key(1))
    learner.layout.check(model)
    again = learner.init(Key(1))
    for name, vector in model.items():
        assert np.array_equal(vector, again[name]), f"init gave two {name} for one key"
        assert np.isfinite(vector).all(), f"init gave {name} that are not finite"


def check_accepts_these_and_refuses_others(learner: Learner, clients: FederatedData) -> None:
    """`check` is silent on data that fit, and says a `DataError` about inputs of another width."""
    learner.check(clients)

    def wider_of(column: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([column, column[..., :1]], axis=-1)

    if not all(column.dtype.kind == "f" for _, column in columns_of(clients.x)):
        return
    wider = replace(clients, x=of_each(clients.x, wider_of))
    try:
        learner.check(wider)
    except DataError:
        return
    raise AssertionError("check took inputs that are wider than the model's; it must say DataError")


def training_leaves_the_model_alone(learner: Learner, clients: FederatedData) -> None:
    """The vectors that `train` is given are as they were."""
    model = learner.init(Key(0))
    before = {name: vector.copy() for name, vector in model.items()}
    local = learner.train(model, clients.train(0), _assignment(0))
    for name, vector in model.items():
        assert np.array_equal(vector, before[name]), f"train changed the {name} it was given"
    assert not np.array_equal(_params(learner, local), before["params"]), "train changed nothing"


def training_forgets_whom_it_trained(learner: Learner, clients: FederatedData) -> None:
    """The same work gives the same bytes, whatever was trained and evaluated in between."""
    model = learner.init(Key(0))
    first = learner.train(model, clients.train(0), _assignment(0))
    kept = _params(learner, first).copy()
    statistics = {name: np.array(v) for name, v in first.statistics.items()}
    other = learner.train(model, clients.train(1), _assignment(1))
    learner.evaluate(_moved(learner, model, other), clients.train(1), clients.task, clients.classes)
    again = learner.train(model, clients.train(0), _assignment(0))
    assert np.array_equal(kept, _params(learner, again)), "training again gave other parameters"
    for name, vector in statistics.items():
        assert np.array_equal(vector, again.statistics[name]), f"training again gave other {name}"


def work_is_counted(learner: Learner, clients: FederatedData) -> None:
    """Steps, examples and the loss are those of the work that was asked for."""
    examples = clients.train(0)
    planned = learner.planned_steps(len(examples))
    model = learner.init(Key(0))
    for fraction in (1.0, 0.5):
        assignment = Assignment(1, Key(0).fold("work", 0), fraction)
        local = learner.train(model, examples, assignment)
        wanted = assignment.steps(planned)
        assert local.steps == wanted, f"{local.steps} steps were done, {wanted} were asked for"
        assert local.examples == len(examples), "LocalResult.examples is what the client holds"
        assert local.seen > 0, "LocalResult.seen counts the examples gone over"
        if "gradient" in learner.abilities:
            assert np.isfinite(float(local.loss)), "LocalResult.loss is the mean training loss"
            lr = rate_at(learner.lr, 1)  # type: ignore[attr-defined]
            assert abs(float(local.path) - wanted * lr) < 1e-6 * wanted, "path is steps x lr"


def gradients_are_slopes(learner: Learner, clients: FederatedData) -> None:
    """The gradient agrees with central differences of the evaluated loss, along it and across."""
    if "gradient" not in learner.abilities:
        return
    examples = clients.train(0)
    model = learner.init(Key(3))
    if _draws(learner, model, examples) or set(model) != {"params"}:
        return  # the loss of training is then not that of evaluation
    gradient = _gradient(learner, model, examples)
    rng = np.random.default_rng(0)
    length = float(np.linalg.norm(gradient))
    across = rng.normal(size=gradient.size)
    across -= gradient * (across @ gradient) / max(length**2, 1e-30)
    for direction in (gradient / length, gradient / length + across / np.linalg.norm(across)):
        step = 1e-2
        ends = []
        for sign in (1, -1):
            moved = (model["params"] + sign * step * direction).astype(np.float32)
            at = {**model, "params": moved}
            sums = learner.evaluate(at, examples, clients.task, clients.classes)
            ends.append(learner.figures(sums, clients.task)["loss"])
        slope, told = (ends[0] - ends[1]) / (2 * step), float(direction @ gradient)
        assert abs(slope - told) < 0.02 * length + 1e-3, (
            f"the loss changes by {slope:.4g} along a direction where the gradient says {told:.4g}"
        )


def one_step_is_down_the_gradient(learner: Learner, clients: FederatedData) -> None:
    """Plain SGD over everything at once is params - lr * gradient."""
    if not ("gradient" in learner.abilities and learner.plain_sgd):
        return
    examples = clients.train(0)
    whole = replace(learner, batch_size=None, epochs=1, steps=1, max_gradient_norm=None)  # type: ignore[type-var]
    model = whole.init(Key(2))
    if _draws(whole, model, examples):
        return
    local = whole.train(model, examples, _assignment(0))
    wanted = model["params"] - rate_at(whole.lr, 1) * _gradient(whole, model, examples)  # type: ignore[attr-defined]
    _near(_params(whole, local), wanted, "one step from params - lr * gradient")


def corrections_are_obeyed(learner: Learner, clients: FederatedData) -> None:
    """Training descends along what the correction gives; `Affine` is the function it stands for."""
    if "gradient" not in learner.abilities:
        return
    examples, model = clients.train(0), learner.init(Key(0))
    still = learner.train(model, examples, _assignment(0), lambda gradient, params: 0 * gradient)
    if learner.plain_sgd:
        assert np.array_equal(_params(learner, still), model["params"]), (
            "a correction that gives zero must leave the parameters where they are"
        )
    constant = learner.asarray(np.linspace(-1, 1, learner.layout.size).astype(np.float32))
    affine = learner.train(model, examples, _assignment(0), Affine(0.5, constant))
    function = learner.train(
        model, examples, _assignment(0), lambda g, params: g + 0.5 * params + constant
    )
    _near(_params(learner, affine), _params(learner, function), "Affine from its function")


def stacks_are_their_clients(learner: Learner, clients: FederatedData) -> None:
    """A cohort of ragged clients gives what each gives alone."""
    few = [clients.train(member) for member in range(min(3, len(clients)))]
    if stacking(learner).stacks(few[0]):
        return
    model = learner.init(Key(0))
    work = [
        Assignment(1, Key(0).fold("work", place), fraction)
        for place, fraction in zip(range(len(few)), (1.0, 0.4, 0.7), strict=False)
    ]
    rng = np.random.default_rng(0)
    own = rng.normal(0, 0.1, (len(few), learner.layout.size)).astype(np.float32)
    for constant in (None, own):
        together = stacking(learner).train_cohort(
            model, few, work,
            None if constant is None else Affine(0.1, learner.asarray(constant)),
        )  # fmt: skip
        rows = np.asarray(learner.asnumpy(together.params))
        for place, (examples, assignment) in enumerate(zip(few, work, strict=True)):
            alone = learner.train(
                model, examples, assignment,
                None if constant is None else Affine(0.1, learner.asarray(constant[place])),
            )  # fmt: skip
            _near(rows[place], _params(learner, alone), f"client {place} in a stack from alone")
            for name in ("steps", "examples", "seen", "path", "loss"):
                column = np.asarray(learner.asnumpy(getattr(together, name)))
                assert column.shape == (len(few), 1), f"{name} of a stack is a column [C, 1]"
                _near(column[place, 0], getattr(alone, name), f"{name} in a stack from that alone")


def gradients_elsewhere_are_gradients(learner: Learner, clients: FederatedData) -> None:
    """`at` of an `At` gives the batch's gradient where it is asked, and moves nothing itself."""
    if "at" not in learner.abilities:
        return
    examples, model = clients.train(0), learner.init(Key(0))
    plain = learner.train(model, examples, _assignment(0))
    here = learner.train(model, examples, _assignment(0), At(lambda g, params, at: at(params)))
    _near(_params(learner, here), _params(learner, plain), "training along at(params) from none")
    for section, vector in plain.statistics.items():
        _near(here.statistics[section], vector, f"{section} after asking for gradients from none")
    point = _disturbed(model["params"], 1)
    given = learner.asarray(point.copy())
    learner.train(model, examples, _assignment(0), At(lambda g, params, at: at(given)))
    assert np.array_equal(learner.asnumpy(given), point), "training changed what at was asked of"
    if not (isinstance(learner, GradientLearner) and learner.plain_sgd):
        return
    whole = replace(learner, batch_size=None, epochs=1, steps=1, max_gradient_norm=None)
    if set(model) != {"params"} or _draws(whole, model, examples):
        return
    local = whole.train(model, examples, _assignment(0), At(lambda g, params, at: at(given)))
    wanted = model["params"] - rate_at(whole.lr, 1) * _gradient(whole, {"params": point}, examples)
    _near(_params(whole, local), wanted, "a step along at(point) from one along its gradient")


def objectives_are_minimised(learner: Learner, clients: FederatedData) -> None:
    """Training goes down the slope of the objective, which is found by differences of outputs."""
    if not ({"objective", "outputs"} <= learner.abilities):
        return
    examples, model = clients.train(0), learner.init(Key(7))
    other, weight = _disturbed(model["params"], 2), np.array(2.0, np.float32)
    vector, number = learner.asarray(other.copy()), learner.asarray(weight.copy())
    objective = Objective(_distance, (vector,), {"weight": number})
    learner.train(model, examples, _assignment(0), None, objective)
    for given, before in ((vector, other), (number, weight)):
        assert np.array_equal(learner.asnumpy(given), before), "training changed what it was given"
    if not (isinstance(learner, GradientLearner) and learner.plain_sgd):
        return
    whole = replace(learner, batch_size=None, epochs=1, steps=1, max_gradient_norm=None)
    if set(model) != {"params"} or _draws(whole, model, examples):
        return
    target = whole.outputs({"params": other}, examples).astype(np.float64)

    def value(params: NDArray[Any]) -> float:
        found = whole.outputs({"params": params.astype(np.float32)}, examples)
        return float(weight * np.square(found - target).mean())

    local = whole.train(model, examples, _assignment(0), None, objective)
    _near(float(local.loss), value(model["params"]), "the loss from the objective's")
    gradient = (model["params"] - _params(whole, local)).astype(np.float64)
    gradient /= rate_at(whole.lr, 1)
    length = float(np.linalg.norm(gradient))
    step = 1e-2 * gradient / max(length, 1e-30)
    slope = (value(model["params"] + step) - value(model["params"] - step)) / 2e-2
    assert length > 0, "an objective moved nothing"
    assert abs(slope - length) < 0.02 * length + 1e-3, (
        f"training went along a gradient of length {length:.4g}, where the objective's slope is "
        f"{slope:.4g}"
    )


def stacks_are_asked_as_their_clients(learner: Learner, clients: FederatedData) -> None:
    """Gradients elsewhere and objectives of a stack are those of each client alone."""
    few = [clients.train(member) for member in range(min(3, len(clients)))]
    if stacking(learner).stacks(few[0]):
        return
    model, count = learner.init(Key(0)), len(few)
    work = [Assignment(1, Key(0).fold("work", place)) for place in range(count)]
    points = np.stack([_disturbed(model["params"], place) for place in range(count)])
    weights = np.arange(1, count + 1, dtype=np.float32)

    def asked(place: int | slice) -> list[tuple[At | None, Objective | None]]:
        own, weight = learner.asarray(points[place]), learner.asarray(np.array(weights[place]))
        found: list[tuple[At | None, Objective | None]] = []
        if "at" in learner.abilities:
            found.append((At(lambda g, params, at: g + at(own)), None))
        if "objective" in learner.abilities:
            found.append((None, Objective(_distance, (own,), {"weight": weight})))
        return found

    together = [
        stacking(learner).train_cohort(model, few, work, *given) for given in asked(slice(None))
    ]
    for place, (examples, assignment) in enumerate(zip(few, work, strict=True)):
        for stack, given in zip(together, asked(place), strict=True):
            alone = learner.train(model, examples, assignment, *given)
            row = np.asarray(learner.asnumpy(stack.params))[place]
            _near(row, _params(learner, alone), f"client {place}, asked in a stack, from alone")


def what_is_not_claimed_is_refused(learner: Learner, clients: FederatedData) -> None:
    """Asked for what is not among its `abilities`, a learner says a `ConfigurationError`."""
    examples, model = clients.train(0), learner.init(Key(0))
    asks: dict[str, Callable[[], object]] = {
        "gradient": lambda: learner.train(model, examples, _assignment(0), Affine()),
        "at": lambda: learner.train(model, examples, _assignment(0), At(lambda g, w, at: g)),
        "objective": lambda: learner.train(
            model, examples, _assignment(0), None, Objective(_distance)
        ),
        "outputs": lambda: learner.outputs(model, examples),
    }
    for ability, ask in asks.items():
        if ability in learner.abilities:
            continue
        try:
            ask()
        except ConfigurationError:
            continue
        raise AssertionError(f"it does not claim {ability!r} among its abilities, but takes it")


def outputs_are_what_is_evaluated(learner: Learner, clients: FederatedData) -> None:
    """Outputs and the mean loss are those that evaluation counts."""
    if "outputs" not in learner.abilities:
        return
    model, examples = learner.init(Key(4)), clients.train(0)
    found = learner.outputs(model, examples)
    assert getattr(found, "dtype", None) == np.float32, "outputs are float32 arrays of NumPy"
    assert len(found) == len(examples), f"{len(found)} outputs for {len(examples)} examples"
    sums = learner.evaluate(model, examples, clients.task, clients.classes)
    wanted = learner.figures(sums, clients.task)["loss"]
    _near(learner.mean_loss(model, examples), wanted, "mean_loss from the evaluated loss")
    _, y = examples.all()
    counted = learner.sums(found, y, wanted, clients.task, clients.classes)
    for name, value in counted.items():
        _near(value, sums[name], f"{name} of the outputs from those evaluated")


def each_part_may_have_its_own_model(learner: Learner, clients: FederatedData) -> None:
    """Sections [C, ...] evaluate each of C parts by its own model."""
    parts = [clients.train(member) for member in range(min(3, len(clients)))]
    models = [
        _moved(learner, model, learner.train(model, part, _assignment(place)))
        for place, part in enumerate(parts)
        for model in [learner.init(Key(place))]
    ]
    stacked = {section: np.stack([model[section] for model in models]) for section in models[0]}
    together = learner.evaluate_each(stacked, parts, clients.task, clients.classes)
    for model, part, found in zip(models, parts, together, strict=True):
        alone = learner.evaluate(model, part, clients.task, clients.classes)
        for name, value in alone.items():
            _near(found[name], value, f"{name} by a model of its own from it alone", 1e-3)


def weights_come_and_go_by_name(learner: Learner, clients: FederatedData) -> None:
    """Arrays by name become a model and a model arrays by name; what is missing is named."""
    model = learner.init(Key(5))
    arrays = {name: np.array(array) for name, array in learner.layout.unpack(model).items()}
    for source in (model, arrays, learner.load_into(model, {})):
        found = learner.vectors_of(source)
        for section, vector in model.items():
            assert np.array_equal(found[section], vector), f"weights came back as other {section}"
    name = next(iter(arrays))
    del arrays[name]
    try:
        learner.vectors_of(arrays)
    except ConfigurationError as error:
        said = str(error)
    else:
        raise AssertionError(f"weights without {name!r} were taken")
    assert name in said, f"{name!r} is missing, which the error does not name: {said}"


def evaluations_add_up(learner: Learner, clients: FederatedData) -> None:
    """Sums over parts are those of each, add up to those of the whole, and are repeatable."""
    model = learner.init(Key(4))
    parts = [clients.train(member) for member in range(min(3, len(clients)))]
    task, classes = clients.task, clients.classes
    each = [learner.evaluate(model, part, task, classes) for part in parts]
    learner.train(model, parts[0], _assignment(0))
    together = learner.evaluate_each(model, parts, task, classes)
    whole = learner.evaluate(model, joined(parts), task, classes)
    for one, same in zip(each, together, strict=True):
        assert set(one) == set(same)
        for name, value in one.items():
            _near(same[name], value, f"{name} of a part among others from it alone", 1e-3)
    for name, value in whole.items():
        total = sum(np.asarray(one[name]) for one in each)
        _near(value, total, f"{name} of everything from the sum over parts", 1e-3)
    if "count" in whole:
        assert whole["count"] in (
            sum(len(part) for part in parts), sum(part.y[:1].size * len(part) for part in parts)
        ), "count is how many labels, tokens or values there are"  # fmt: skip


def runs_learn_and_repeat(learner: Learner, clients: FederatedData) -> None:
    """Rounds of FedAvg lower the loss; the same seed gives the same bytes on any engine choice."""
    federation = Federation(
        learner=learner, algorithm=FedAvg(), schedule=Synchronous(rounds=4, cohort=2)
    )
    run = federation.simulate(clients, seed=1)
    again = federation.simulate(clients, seed=1)
    for name, vector in run.model.items():
        assert np.array_equal(vector, again.model[name]), f"a second run gave other {name}"
    start = federation.learner.init(Key(1).fold("init"))
    losses = [_loss(learner, model, clients) for model in (start, run.model)]
    assert losses[1] < losses[0], f"four rounds took the loss from {losses[0]} to {losses[1]}"
    alone = federation.simulate(clients, seed=1, engine="sequential")
    _near(alone.model["params"], run.model["params"], "one client at a time from the default", 1e-3)


def the_local_loop_is_as_documented(learner: Learner, clients: FederatedData) -> None:
    """Plain SGD goes over the client's own examples in the order that the key draws, in batches of
    `batch_size`, `epochs` times, clipped to `max_gradient_norm`, at the rate of the round."""
    if not isinstance(learner, GradientLearner) or not learner.plain_sgd:
        return
    examples = clients.train(0)
    plan = replace(
        learner, lr=Exponential(0.05, 0.5), batch_size=max(learner.smallest_batch, 5), epochs=2,
        steps=None, max_gradient_norm=0.5,
    )  # fmt: skip
    model = plan.init(Key(5))
    if set(model) != {"params"} or _draws(plan, model, examples):
        return
    for round in (1, 2):
        assignment = Assignment(round, Key(6).fold("work", round))
        local = plan.train(model, examples, assignment)
        count, size = len(examples), plan.batch_size or len(examples)
        params = model["params"].astype(np.float64)
        seen = 0
        words = [assignment.key.integer("batches")]
        for order in permutations(words, count, 2)[0]:
            for start in range(0, count, size):
                x, y = examples.take(order[start : start + size])
                batch = Examples(x, y)
                at = {"params": params.astype(np.float32)}
                gradient = _gradient(plan, at, batch)
                gradient *= min(1.0, 0.5 / max(float(np.linalg.norm(gradient)), 1e-12))
                params = params - 0.05 * 0.5 ** (round - 1) * gradient
                seen += len(y)
        _near(_params(plan, local), params, f"round {round} from the loop as documented", 1e-3)
        assert int(local.seen) == seen, f"seen is {local.seen}, but {seen} examples were gone over"


def other_peoples_rows_do_not_matter(learner: Learner, clients: FederatedData) -> None:
    """A client's training depends on its own examples and on nobody else's."""
    examples = clients.train(0)
    model, rows = learner.init(Key(0)), examples.rows
    if rows is None:
        return
    others = np.setdiff1d(np.arange(len(examples.y)), rows)

    def turned(column: NDArray[Any]) -> NDArray[Any]:
        other = column.copy()
        other[others] = other[others][::-1]
        return other

    x, y = of_each(examples.x, turned), turned(examples.y)
    first = learner.train(model, examples, _assignment(0))
    second = learner.train(model, Examples(x, y, rows), _assignment(0))
    _near(_params(learner, second), _params(learner, first), "training beside other examples", 1e-6)


def keys_are_what_draws(learner: Learner, clients: FederatedData) -> None:
    """Another key is another order of the examples, where there is more than one batch."""
    if not isinstance(learner, GradientLearner):
        return
    plan = replace(learner, batch_size=max(learner.smallest_batch, 4), steps=None)
    examples, model = clients.train(0), plan.init(Key(0))
    one, other = (
        _params(plan, plan.train(model, examples, Assignment(1, Key(seed)))) for seed in (0, 1)
    )
    assert not np.array_equal(one, other), "two keys drew the same batches in the same order"


def identities_are_steady(learner: Learner, clients: FederatedData) -> None:
    """What makes two runs the same is the same when it is asked again."""
    assert describe(learner) == describe(learner), "the description changes from call to call"


def predictions_are_scored(learner: Learner, clients: FederatedData) -> None:
    """Accuracy changes when labels do: right and wrong labels cannot both be right."""
    if not isinstance(clients.task, Classification):
        return
    model, examples = learner.init(Key(0)), clients.all_train()
    x, y = examples.all()
    scores = [
        float(
            learner.evaluate(model, Examples(x, labels), clients.task, clients.classes)["correct"]
        )
        for labels in (
            (y + shift) % (clients.classes or 2) for shift in range(clients.classes or 2)
        )
    ]
    assert sum(scores) == len(y), f"over all ways to label, {sum(scores)} of {len(y)} are right"


#: Every check; each takes a learner and a small population that it fits.
LEARNER_CHECKS: tuple[Check, ...] = (
    init_fits_the_layout_and_the_seed,
    check_accepts_these_and_refuses_others,
    training_leaves_the_model_alone,
    training_forgets_whom_it_trained,
    work_is_counted,
    gradients_are_slopes,
    one_step_is_down_the_gradient,
    corrections_are_obeyed,
    gradients_elsewhere_are_gradients,
    objectives_are_minimised,
    stacks_are_their_clients,
    stacks_are_asked_as_their_clients,
    what_is_not_claimed_is_refused,
    outputs_are_what_is_evaluated,
    each_part_may_have_its_own_model,
    weights_come_and_go_by_name,
    evaluations_add_up,
    the_local_loop_is_as_documented,
    other_peoples_rows_do_not_matter,
    keys_are_what_draws,
    identities_are_steady,
    predictions_are_scored,
    runs_learn_and_repeat,
)


def _distance(outputs: Any, targets: Any, other: Any, *, weight: Any) -> Any:
    """An objective in any framework: how far outputs are from those of other parameters."""
    return weight * ((outputs - other) ** 2).mean()


def _disturbed(params: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Parameters nearby."""
    noise = np.random.default_rng(seed).normal(0, 0.2, params.shape)
    return (params + noise).astype(np.float32)


def _assignment(client: int) -> Assignment:
    return Assignment(1, Key(0).fold("work", client))


def _params(learner: Learner, local: LocalResult) -> NDArray[np.float32]:
    return np.asarray(learner.asnumpy(local.params))


def _moved(learner: Learner, model: Vectors, local: LocalResult) -> Vectors:
    return {**model, **local.statistics, "params": _params(learner, local).copy()}


def _gradient(learner: Learner, model: Vectors, examples: Examples) -> NDArray[np.float64]:
    gradient, _ = learner.gradient(model, examples, Key(0))
    return np.asarray(learner.asnumpy(gradient), np.float64).copy()


def _draws(learner: Learner, model: Vectors, examples: Examples) -> bool:
    """Whether the gradient depends on draws, as dropout's does."""
    one, other = (
        np.array(learner.asnumpy(learner.gradient(model, examples, Key(seed))[0]))
        for seed in (0, 1)
    )
    return not np.array_equal(one, other)


def _near(one: Any, other: Any, what: str, near: float = NEAR) -> None:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape}"
    distance = float(np.linalg.norm(a - b))
    size = float(np.linalg.norm(b)) + 1e-3
    assert distance <= near * size, f"{what} differs by {distance / size:.2g} of its size"


def _loss(learner: Learner, model: Vectors, clients: FederatedData) -> float:
    sums = learner.evaluate(model, clients.all_train(), clients.task, clients.classes)
    return learner.figures(sums, clients.task)["loss"]
