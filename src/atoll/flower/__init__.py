"""Flower apps, unmodified, on this machine: no Ray, no servers, one seed for all draws."""

from atoll.errors import require

require("flwr", "flwr>=1.41,<1.43", "atoll flower")

from atoll.flower.apps import App, read_app  # noqa: E402
from atoll.flower.run import run_app  # noqa: E402

__all__ = ["App", "read_app", "run_app"]
