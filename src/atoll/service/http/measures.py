"""Measures: what the server tells Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from atoll.service.loop import FederationLoop

BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class Measures:
    """Counters of one server process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: Any = {"registry": self.registry, "namespace": "atoll"}
        self._requests = Histogram(
            "request_seconds", "Time to answer", ("method", "path", "status"), buckets=BUCKETS,
            **given,
        )  # fmt: skip
        self._refused = Counter("refusals", "Requests and updates refused", ("reason",), **given)
        self._received = Counter("received_bytes", "Bytes of updates that came", **given)
        self._sent = Counter("sent_bytes", "Bytes of models that went", **given)
        self._round = Gauge("version", "Rounds that have closed", **given)
        self._sites = Gauge("sites", "Sites that have joined and were not revoked", **given)
        self._at_work = Gauge("sites_at_work", "Sites that owe an update", **given)
        self._sessions = Gauge("sessions", "Sessions that are good", **given)
        self._parked = Gauge("long_polls", "Check-ins that wait for news", **given)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(method, path, str(status)).observe(seconds)

    def refused(self, reason: str) -> None:
        """Something was refused."""
        self._refused.labels(reason).inc()

    def received(self, count: int) -> None:
        """Bytes of updates came."""
        self._received.inc(count)

    def sent(self, count: int) -> None:
        """Bytes of models went."""
        self._sent.inc(count)

    def exposition(self, loop: FederationLoop | None, sessions: int, parked: int) -> bytes:
        """Everything in Prometheus' text format."""
        if loop is not None:
            self._round.set(loop.version["version"])
            self._sites.set(len(loop.members.names))
            self._at_work.set(len(loop.open))
        self._sessions.set(sessions)
        self._parked.set(parked)
        return generate_latest(self.registry)
