"""Terms: what the parties of a federation agree on, and how it is served."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.rounds.plan import Plan
from atoll.tracking.describe import describe, digest


def plan_digest(plan: Plan) -> str:
    """SHA-256 (hex) of what clients must agree on: learner, algorithm and pipeline."""
    return digest([describe(part) for part in (plan.learner, plan.algorithm, plan.pipeline)])


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a federation is served.

    Args:
        seed: of every draw.
        sites: how many must have joined before the first round; None is the schedule's cohort or,
            without one, everyone who was invited.
        lease: seconds after which an invited site that was not heard of is given up as lost.
        presence: seconds for which a site that was heard of counts as there.
        kept: how many past model versions stay on disk, besides those still needed.
    """

    seed: int = 0
    sites: int | None = None
    lease: float = 900.0
    presence: float = 900.0
    kept: int = 3
