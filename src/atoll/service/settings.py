"""Settings: how a federation is served, which no site needs to agree to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a federation is served.

    Args:
        seed: of every draw.
        sites: how many must be there before the first round; None is the schedule's cohort or,
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
