"""A client's task: from what it received and remembers to its message and new state.

The simulator and a real site run these same functions. What a client keeps from round to round is
one tree: "algorithm" is what the algorithm remembers, "private" the client's own part of the model,
"stages" what client halves of stages remember, and "kept" what it keeps of the questions of the
round that is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.aggregation.conversation import Ask
from atoll.aggregation.schema import Spec
from atoll.algorithms.client import Client, Holder
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Array, Tree, Vectors, describe_names, flatten, nest
from atoll.data.examples import Examples
from atoll.errors import RunError, no_exit
from atoll.learners.base import Assignment, Learner
from atoll.rounds.plan import Plan


class ClientTask(NamedTuple):
    """One client's task: a member of the population, its state and its assignment.

    `number` is what its draws are keyed by, and `step` the question of the round that they are for;
    its update is multiplied by `discount`; `mail` is what the question tells this client alone.
    """

    member: int
    client: str
    assignment: Assignment
    state: Tree
    number: int = 0
    discount: float = 1.0
    mail: Vectors = {}  # noqa: RUF012 - never written to
    step: int = 0

    @property
    def sender(self) -> tuple[str, int]:
        """Whose update it will be."""
        return self.client, self.number

    def row(self) -> list[Any]:
        """The task without its arrays, ready for JSON, for `read` elsewhere."""
        about = self.assignment
        return [
            self.member, self.client, about.round, self.number, about.fraction, self.discount,
            self.step,
        ]  # fmt: skip

    @staticmethod
    def read(row: Sequence[Any], key: Key, state: Tree, mail: Vectors | None = None) -> ClientTask:
        """The task that `row` tells, in a run with this key."""
        member, client, round, number, fraction, discount, step = row
        assignment = assignment_for(key, client, round, number, fraction, step=step)
        return ClientTask(member, client, assignment, state, number, discount, mail or {}, step)


class TaskResult(NamedTuple):
    """What came of a task, apart from what went into the sum.

    `fault` says why the update was refused, if it was; `size` is its message in bytes; `state` is
    the client's new state if the update is accepted.
    """

    fault: str
    size: int
    state: Tree


@dataclass(frozen=True, eq=False)
class Received:
    """What a client received, by whose it is, as it works with it."""

    algorithm: Vectors
    statistics: Vectors = field(default_factory=dict)
    stages: Tree = field(default_factory=dict)
    told: Vectors = field(default_factory=dict)
    given: Vectors = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan, tree: Tree) -> Received:
        """From the tree that travelled; what went through download stages is unpacked."""
        algorithm = dict(tree.get("algorithm", {}))
        if plan.downward is not None:
            algorithm |= plan.downward.decode(tree.get("download", {}))
        question = tree.get("question", {})
        return Received(
            algorithm,
            tree.get("statistics", {}),
            tree.get("stages", {}),
            question.get("told", {}),
            question.get("given", {}),
        )


def is_model(broadcast: Tree, model: Vectors) -> bool:
    """Whether clients are told the model, whole and as it is, and nothing beside it."""
    told = flatten(broadcast)
    plain = {name: f"statistics/{name}" for name in model} | {"params": "algorithm/params"}
    return {plain[name] for name in model} == set(told) and all(
        told[plain[name]] is vector for name, vector in model.items()
    )


def as_told(vectors: Vectors) -> Tree:
    """What clients are told from the arrays of a file, which may be a model's (see `is_model`)."""
    if "params" not in vectors:
        return nest(vectors)
    others = {name: vector for name, vector in vectors.items() if name != "params"}
    return {"algorithm": {"params": vectors["params"]}, "statistics": others}


def with_question(broadcast: Tree, ask: Ask) -> Tree:
    """What travels with a question: the model too, where clients are to work or to look at it."""
    question = {"told": ask.told, "given": ask.given}
    filled = {name: part for name, part in question.items() if part}
    whole = broadcast if ask.works or ask.owner == "algorithm" else {}
    return {**whole, "question": filled} if filled else dict(whole)


def assignment_for(
    seed_key: Key,
    client: str,
    round: int,
    number: int,
    fraction: float,
    secret: Key | None = None,
    step: int = 0,
) -> Assignment:
    """The assignment of a client in a round; its draws are those of its task's number.

    Questions that follow the first draw numbers of their own: what hides one answer must not hide
    another.
    """
    key = seed_key.fold("work", number, client)
    if step:
        key = key.fold("question", step)
        secret = None if secret is None else secret.fold("question", step)
    return Assignment(round, key, fraction, secret)


def first_state(plan: Plan, received: Received, blank: Vectors) -> Tree:
    """What a client keeps before its first task; `blank` is what its private part begins from."""
    return _filled(
        {
            "algorithm": plan.algorithm.remember(received.algorithm, plan.split.shared),
            "private": dict(blank),
            "stages": plan.stages.remember(),
        }
    )


def at_work(
    plan: Plan, received: Received, task: ClientTask, examples: Examples
) -> tuple[Client, dict[str, Array], dict[str, Array]]:
    """A client before its work, with what it got and remembers in the learner's arrays."""
    learner = plan.learner
    holder = Holder(task.client, examples, task.assignment)
    private = dict(task.state.get("private", {}))
    client = Client(learner, received.statistics, plan.split, holder, private, plan.public)
    got = in_learner(learner, {**received.algorithm, **received.given})
    return client, got, in_learner(learner, task.state.get("algorithm", {}))


def run_task(
    plan: Plan, received: Received, task: ClientTask, examples: Examples
) -> tuple[Update, Tree]:
    """One client's work and the client half of the pipeline: its message and its new state.

    Neither `received` nor the task's state is changed; the message shares no array with them.
    """
    client, got, mine = at_work(plan, received, task, examples)
    with lent(got, mine), no_exit("a client's training"):
        update, kept = plan.algorithm.work(client, got, mine)
    own = as_declared(update, plan, client.statistics, received.statistics)
    memory = {
        name: conformed(plan.learner, name, value, like, "memory")
        for name, value, like in remembered(kept, task.state)
    }
    return sent(plan, own, received, task, {"algorithm": memory, "private": client.private})


def as_declared(update: Update, plan: Plan, changed: Vectors, statistics: Vectors) -> Update:
    """One client's update in NumPy, in the shapes and dtypes that its algorithm declared."""
    learner, schema = plan.learner, plan.schema
    shares = {name: _number("share", value) for name, value in update.shares.items()}
    absent = {name for name, share in shares.items() if share == 0}
    check_names(update, plan, absent)
    return Update(
        {
            name: conformed(learner, name, update.vectors[name], spec, "update")
            for name, spec in schema.vectors.items()
            if name not in absent
        },
        _number("weight", update.weight),
        {
            name: np.asarray(changed.get(name, np.zeros_like(statistics[name])), spec.dtype)
            for name, spec in schema.statistics.items()
        },
        {name: _number(name, value) for name, value in update.metrics.items()},
        shares,
    )


def sent(
    plan: Plan, update: Update, received: Received, task: ClientTask, state: Tree
) -> tuple[Update, Tree]:
    """The client half of the pipeline: the message, and all that the client keeps."""
    key = task.assignment.key.fold("encode")
    secret = (task.assignment.secret or task.assignment.key).fold("encode")
    message, stages = plan.stages.encode(
        update, received.stages, task.state.get("stages", {}), key, secret
    )
    reducer = plan.stages.reducer
    message, kept = reducer.seal(
        message, received.told, task.mail, task.state.get("kept", {}),
        secret if reducer.secret else key,
    )  # fmt: skip
    return message, _filled({**state, "stages": stages, "kept": kept})


def answer_question(
    plan: Plan, received: Received, name: str, owner: str, task: ClientTask, examples: Examples
) -> tuple[Update, Vectors]:
    """A client's answer to a question without work, and what it keeps until the round is over."""
    kept: Vectors = task.state.get("kept", {})
    if owner == "algorithm":
        client, got, mine = at_work(plan, received, task, examples)
        told = in_learner(plan.learner, received.told)
        with lent(got, mine, told), no_exit("a client's answer"):
            answer = plan.algorithm.answer(name, client, got, mine, told)
        return _plain(answer, plan.learner), kept
    reducer = plan.stages.reducer
    secret = task.assignment.secret or task.assignment.key
    key = (secret if reducer.secret else task.assignment.key).fold("exchange")
    return reducer.answer(name, received.told, task.mail, kept, key)


def _plain(update: Update, learner: Learner) -> Update:
    """An algorithm's answer in NumPy; a number is a float32 array of one."""
    vectors: Vectors = {}
    for name, value in update.vectors.items():
        given: Any = value
        if isinstance(given, int | float):
            vectors[name] = np.array([given], np.float32)
        else:
            vectors[name] = given if isinstance(given, np.ndarray) else learner.asnumpy(given)
    return Update(vectors, _number("weight", update.weight))


def check_names(
    update: Update, plan: Plan, absent: set[str] | frozenset[str] = frozenset()
) -> None:
    """Raise `RunError` if an algorithm's update holds something else than it declared."""
    wanted, given = set(plan.schema.vectors), set(update.vectors)
    if given - wanted or wanted - given - absent:
        raise RunError(
            f"{plan.algorithm!r} reports {describe_names(given)}, but it declared "
            f"{describe_names(wanted)} in `reports`"
        )
    for name in set(update.shares) - {n for n, s in plan.schema.vectors.items() if s.optional}:
        raise RunError(
            f"{plan.algorithm!r} gives {name!r} a share, but did not declare it optional: "
            f"Spec(shape, optional=True)"
        )
    for name in set(update.metrics) - set(plan.schema.metrics):
        raise RunError(
            f"{plan.algorithm!r} reports a metric {name!r} that is not among its `metrics`; "
            "declare it there with its range"
        )


def remembered(kept: Mapping[str, Any], state: Tree) -> list[tuple[str, Any, Spec]]:
    """What an algorithm remembers now, with what it declared it would."""
    declared: Vectors = state.get("algorithm", {})
    if kept.keys() != declared.keys():
        raise RunError(
            f"the algorithm remembers {describe_names(kept)}, but declared "
            f"{describe_names(declared)} in `remember`; every name must be there from the start"
        )
    return [
        (name, value, Spec(declared[name].shape, str(declared[name].dtype)))
        for name, value in kept.items()
    ]


def conformed(
    learner: Learner, name: str, value: Any, spec: Spec, what: str, clients: int | None = None
) -> NDArray[Any]:
    """An array of the learner's as NumPy's of a declared kind; [C, ...] for so many clients."""
    array = in_numpy(learner, value)
    lead = () if clients is None else (clients,)
    if array.shape != (*lead, *spec.shape):
        array = _spread(name, array, spec, what, lead)
    if array.dtype == np.dtype(spec.dtype):
        return np.asarray(array)
    cast = np.asarray(array, spec.dtype)
    if cast.dtype.kind in "iu" and not np.array_equal(cast, array):
        raise RunError(
            f"the algorithm's {what} {name!r} was declared {spec.dtype}, and is not whole numbers"
        )
    return cast


def _spread(
    name: str, array: NDArray[Any], spec: Spec, what: str, lead: tuple[int, ...]
) -> NDArray[Any]:
    """One array for all clients is repeated; a number is an array of one."""
    if spec.size == 1 and array.size in (1, *lead):
        return np.broadcast_to(array.reshape(-1, *spec.shape), (*(lead or (1,)), *spec.shape))[
            ... if lead else 0
        ]
    if lead and array.shape == spec.shape:
        return np.broadcast_to(array, (*lead, *spec.shape))
    told = f" for {lead[0]} clients" if lead else ""
    hint = (
        "; write its rules with operators only, so that they keep the leading axis of a stack"
        if lead
        else ""
    )
    raise RunError(
        f"the algorithm's {what} {name!r} has shape {list(array.shape)}{told}, but was declared "
        f"{list(spec.shape)}{hint}"
    )


def in_learner(learner: Learner, vectors: Vectors) -> dict[str, Array]:
    """Arrays of the learner's own kind, shared where possible, and not to be written."""
    found = {name: learner.asarray(vector) for name, vector in vectors.items()}
    return {name: _read_only(each) for name, each in found.items()}


def _read_only(array: Array) -> Array:
    """The same numbers, which NumPy does not let anybody write."""
    if isinstance(array, np.ndarray):
        array = array.view()
        array.flags.writeable = False
    return array


@contextmanager
def lent(*given: Mapping[str, Array]) -> Iterator[None]:
    """Raise `RunError` if what a rule is given is written meanwhile: others are given it too."""
    held = [(name, each) for arrays in given for name, each in arrays.items()]
    # torch counts the writes to a tensor, and cannot forbid them.
    writes = [getattr(each, "_version", 0) for _, each in held]
    advice = "other clients are given the same array; compute a new one instead"
    try:
        yield
    except ValueError as error:
        if "read-only" in str(error):
            raise RunError(f"a rule writes into an array that it was given: {advice}") from error
        raise
    for (name, each), before in zip(held, writes, strict=True):
        if getattr(each, "_version", 0) != before:
            raise RunError(f"a rule wrote into the {name!r} that it was given: {advice}")


def in_numpy(learner: Learner, value: Any) -> NDArray[Any]:
    """A number or an array, NumPy's or the learner's, as NumPy's; shared where possible."""
    if isinstance(value, int | float | np.ndarray):
        return np.asarray(value)
    return learner.asnumpy(value)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RunError(f"an update's {name} is {type(value).__name__}, not a number") from None


def _filled(tree: Tree) -> Tree:
    return {name: part for name, part in tree.items() if part}
