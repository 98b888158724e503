"""Flower apps, unmodified, on this machine: no Ray, no servers, one seed for all draws."""

import os

from atoll.errors import require

# Flower reads this when it is imported, and reports to its makers unless it is told not to.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
require("flwr", "flwr>=1.41,<1.43", "atoll flower")

from atoll.flower.apps import App, read_app, simulations_of  # noqa: E402
from atoll.flower.run import run_app  # noqa: E402

__all__ = ["App", "read_app", "run_app", "simulations_of"]
