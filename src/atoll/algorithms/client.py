"""The client as an algorithm sees it: what `work` may do where the data are.

One object for one client or, in an engine, for a stack of them; numbers are then columns [C, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import STATISTICS, Array, Split, Vectors
from atoll.data.examples import Examples
from atoll.errors import ConfigurationError
from atoll.learners.base import (
    Affine,
    Assignment,
    At,
    Correction,
    Learner,
    LocalResult,
    Objective,
    model_at,
)

Part = Literal["shared", "private"]


@dataclass(frozen=True)
class Holder:
    """One client of those that a `Client` stands for."""

    name: str
    examples: Examples
    assignment: Assignment


@dataclass
class Client:
    """One client at work in one round.

    `model` is the received model, of what is shared; `private` the client's own part of it, where
    the plan keeps one; `statistics` what the work changed in the shared buffers and counters. All
    three stay out of the algorithm's sight: it handles shared parameters.
    """

    learner: Learner
    model: Vectors
    split: Split
    holder: Holder
    private: Vectors = field(default_factory=dict)
    public: Examples | None = None
    statistics: Vectors = field(default_factory=dict)
    _passes: int = 0

    #: Whether this is a stack of clients.
    stacked: ClassVar[bool] = False

    @property
    def holders(self) -> list[Holder]:
        """The client, or each of a stack."""
        return [self.holder]

    @property
    def name(self) -> str:
        """The client's name."""
        return self.holder.name

    @property
    def examples(self) -> Examples:
        """The client's own examples."""
        return self.holder.examples

    @property
    def round(self) -> int:
        """The round, counted from 1."""
        return self.holder.assignment.round

    @property
    def count(self) -> Any:
        """How many examples the client holds."""
        return self._column([len(holder.examples) for holder in self.holders])

    def each(self, rule: Callable[[Holder], Any]) -> Array:
        """`rule(holder)` as this learner's float32 array [...]; [C, ...] for a stack.

        Here is the place for what operators cannot say: counts of labels, masks, own draws
        (`holder.assignment.key.fold(...).generator()`).
        """
        rows = [np.asarray(rule(holder), np.float32) for holder in self.holders]
        return self.learner.asarray(np.stack(rows) if self.stacked else rows[0])

    def train(
        self,
        params: Array,
        correction: Correction | At | None = None,
        *,
        objective: Objective | None = None,
        only: Part | None = None,
        share: Any = 1.0,
        draws: str = "",
        on: Examples | None = None,
        statistics: Vectors | None = None,
    ) -> LocalResult:
        """The local loop from `params` along `correction(gradient, params)`.

        A second call draws other batches than the first, and goes on from the statistics that the
        first left. Declare `passes` accordingly.

        Args:
            params: shared parameters, [P] or [C, P].
            objective: what to minimise instead of the learner's loss.
            only: train the "shared" or the "private" part, and leave the other as it is.
            share: of the planned steps, also more than 1; a number or a column.
            draws: a name for this call's draws, instead of its number.
            on: other examples than the client's own.
            statistics: begin from these (by section) and leave the received ones alone: the
                model that is trained is another one.
        """
        whole = self._whole(params)
        if statistics is not None:
            whole |= {name: vector for name, vector in statistics.items() if name in whole}
        holders = [
            Holder(
                holder.name,
                on or holder.examples,
                self._assignment(holder.assignment, _at(share, c), draws),
            )
            for c, holder in enumerate(self.holders)
        ]
        self._passes += 1
        local = self._loop(whole, holders, self._corrected(correction, only), objective)
        if statistics is None:
            self._keep(local.statistics)
        after = self._shared_of(local, keep=statistics is None and only != "shared")
        if only != "private":
            return after
        # The optimiser's own terms, weight decay for one, move what has no gradient too.
        still = np.broadcast_to(self._numpy(params), after.params.shape)
        return replace(after, params=self.learner.asarray(still.copy()))

    def gradient(self, params: Array, *, keep_statistics: bool = False) -> Array:
        """The gradient [P] of the client's mean loss at shared parameters; [C, P] for a stack."""
        whole, rows, after = self._whole(params), [], []
        for c, holder in enumerate(self.holders):
            own = model_at(whole, c) if self.stacked else whole
            gradient, statistics = self.learner.gradient(
                own, holder.examples, holder.assignment.key
            )
            rows.append(np.array(self._numpy(gradient)))
            after.append(statistics)
        if keep_statistics and after[0]:
            self._keep({s: self._stack([each[s] for each in after]) for s in after[0]})
        gradients = self._stack(rows)
        if not self.split.trivial:
            gradients = gradients[..., self.split.places["params"][0]]
        return self.learner.asarray(gradients)

    def loss(self, params: Array, on: Examples | None = None) -> Array:
        """The mean loss at shared parameters over the client's examples, as in evaluation."""
        whole = self._whole(params)
        losses = [
            self.learner.mean_loss(
                model_at(whole, c) if self.stacked else whole, on or holder.examples
            )
            for c, holder in enumerate(self.holders)
        ]
        if not self.stacked:
            return losses[0]
        return self.learner.asarray(np.array(losses, np.float32)[:, None])

    def outputs(self, params: Array, on: Examples) -> Array:
        """What the model at shared parameters says of examples: [n, ...], or [C, n, ...]."""
        whole = self._whole(params)
        rows = [
            self.learner.outputs(model_at(whole, c) if self.stacked else whole, on)
            for c in range(len(self.holders))
        ]
        return self.learner.asarray(self._stack(rows))

    def whole(self, params: Array) -> Vectors:
        """The whole model at shared parameters, with the client's own part: NumPy sections."""
        return self._whole(params)

    def _loop(
        self,
        model: Vectors,
        holders: list[Holder],
        correction: Correction | At | None,
        objective: Objective | None,
    ) -> LocalResult:
        (holder,) = holders
        return self.learner.train(
            model, holder.examples, holder.assignment, correction, *_more(objective)
        )

    def _assignment(self, assignment: Assignment, share: float, draws: str) -> Assignment:
        """The circumstances of this pass: draws of its own, and a share of the work."""
        name = draws or self._passes
        if name:
            assignment = replace(assignment, key=assignment.key.fold("pass", name))
        return (
            replace(assignment, fraction=assignment.fraction * share) if share != 1 else assignment
        )

    def _whole(self, params: Array) -> Vectors:
        shared = {**self.model, "params": self._numpy(params)}
        for section, change in self.statistics.items():
            shared[section] = self.model[section] + change
        return self.split.merged(shared, self.private)

    def _shared_of(self, local: LocalResult, *, keep: bool) -> LocalResult:
        """What was trained, of the shared parameters; the client's own are kept."""
        if self.split.trivial:
            return local
        ours, own = self.split.places["params"]
        if keep and len(own):
            self.private = {**self.private, "params": self._numpy(local.params)[..., own]}
        return replace(local, params=local.params[..., ours])

    def _corrected(
        self, correction: Correction | At | None, only: Part | None
    ) -> Correction | At | None:
        """The correction of shared parameters, as one of all of them."""
        if self.split.trivial:
            if only == "private":
                raise ConfigurationError("nothing is private here: give Federation(private=...)")
            return correction
        if correction is None and only is None:
            return None
        return _whole_correction(correction, only, self.split, self.learner, self._numpy)

    def _keep(self, statistics: Mapping[str, Any]) -> None:
        """Note what the shared statistics changed by; the client's own are its own."""
        shared: Vectors = {}
        for section in STATISTICS:
            if section not in statistics:
                continue
            value = statistics[section]
            if self.split.trivial:
                shared[section] = value
                continue
            ours, own = self.split.places[section]
            if len(own):
                self.private = {**self.private, section: value[..., own]}
            if len(ours):
                shared[section] = value[..., ours] if len(own) else value
        self.statistics = {
            section: _change(value, self.model[section]) for section, value in shared.items()
        }

    def _numpy(self, value: Any) -> NDArray[Any]:
        return value if isinstance(value, np.ndarray) else self.learner.asnumpy(value)

    def _stack(self, rows: list[NDArray[Any]]) -> NDArray[Any]:
        return np.stack(rows) if self.stacked else rows[0]

    def _column(self, values: list[Any]) -> Any:
        """A number, or a column [C, 1]."""
        return np.array(values)[:, None] if self.stacked else values[0]


def _whole_correction(
    correction: Correction | At | None,
    only: Part | None,
    split: Split,
    learner: Learner,
    numpy: Callable[[Any], NDArray[Any]],
) -> Correction | At:
    """A correction of the shared parameters that leaves the private ones to their gradient."""
    ours, own = split.places["params"]
    size = len(ours) + len(own)
    fused = only is None and isinstance(correction, Affine) and not correction.scale
    if fused and isinstance(correction, Affine) and correction.constant is not None:
        constant = numpy(correction.constant)
        whole = np.zeros((*constant.shape[:-1], size), np.float32)
        whole[..., ours] = constant
        return Affine(constant=learner.asarray(whole))
    keep = np.ones(size, np.float32)
    if only is not None:
        keep[ours if only == "private" else own] = 0
    mask = learner.asarray(keep)
    spread = np.zeros(size, np.int64)
    spread[ours] = np.arange(len(ours))
    shares = np.zeros(size, np.float32)
    shares[ours] = 1
    shared = learner.asarray(shares)

    def widened(direction: Array, gradient: Array) -> Array:
        """A direction of the shared parameters, with the gradient where they are private."""
        return (direction[..., spread] * shared + gradient * (1 - shared)) * mask

    if correction is None:
        return lambda gradient, params: gradient * mask
    if isinstance(correction, At):
        rule = correction.rule

        def at_rule(gradient: Array, params: Array, at: Callable[[Array], Array]) -> Array:
            def at_shared(points: Array) -> Array:
                whole = points[..., spread] * shared + params * (1 - shared)
                return at(whole)[..., ours]

            return widened(rule(gradient[..., ours], params[..., ours], at_shared), gradient)

        return At(at_rule)
    plain = correction
    return lambda gradient, params: widened(plain(gradient[..., ours], params[..., ours]), gradient)


def _more(objective: Objective | None) -> tuple[Objective, ...]:
    """Learners that people wrote before there were objectives take four arguments."""
    return () if objective is None else (objective,)


def _at(value: Any, place: int) -> float:
    """A number, or the entry of a column at this place."""
    if isinstance(value, int | float):
        return value
    flat = np.asarray(value, np.float64).reshape(-1)
    return float(flat[place] if len(flat) > 1 else flat[0])


def _change(after: NDArray[Any], before: NDArray[Any]) -> NDArray[Any]:
    """The difference, also where both are the same infinity (as in attention masks)."""
    with np.errstate(invalid="ignore"):
        return np.where(after == before, np.zeros_like(after), after - before)
