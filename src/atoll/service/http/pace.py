"""Pace steering: when to come again, so that many clients arrive evenly and not all at once.

Bonawitz et al., "Towards federated learning at scale", MLSys 2019, section 2.3.
"""

from __future__ import annotations

import time

#: Check-ins per second that one process should see, and the shortest and longest window.
RATE = 500.0
SHORTEST, LONGEST = 0.5, 900.0
AUDITS_PER_SECOND = 20.0


class Pace:
    """Counts arrivals over the last seconds and sizes the window to come again in."""

    def __init__(self, rate: float = RATE) -> None:
        self._rate = rate
        self._level, self._at = 0.0, 0.0
        self._budget, self._audited = AUDITS_PER_SECOND, time.monotonic()

    def arrived(self, now: float) -> None:
        """A client was sent away to come again."""
        self._level = self._now(now) + 1.0
        self._at = now

    def window(self, waited: bool) -> tuple[float, float]:
        """Seconds (at least, at most) after which to come again; those who waited come sooner.

        `level` clients came in about ten seconds; were they all to come again evenly within the
        window, the rate would be kept.
        """
        longest = min(max(self._level / self._rate, SHORTEST), LONGEST)
        return (0.0, longest) if waited else (longest / 2, longest * 1.5)

    def may_audit(self) -> bool:
        """Whether another refusal fits in the log: at most twenty a second, after a burst."""
        now = time.monotonic()
        self._budget = min(
            AUDITS_PER_SECOND * 5, self._budget + (now - self._audited) * AUDITS_PER_SECOND
        )
        self._audited = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True

    def _now(self, now: float) -> float:
        """The level, which decays with a time constant of ten seconds."""
        return float(self._level * 2.0 ** (-max(now - self._at, 0.0) / 7.0))
