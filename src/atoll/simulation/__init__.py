"""Simulation: a federation in this process, in virtual time."""

from atoll.simulation.baselines import Baseline, Baselines
from atoll.simulation.devices import (
    Conditions,
    Devices,
    LogNormal,
    RandomDevices,
    Stragglers,
    Trace,
    TracedDevices,
)
from atoll.simulation.engine import Engine, Sequential, Turn
from atoll.simulation.interrupt import Interrupted
from atoll.simulation.simulator import Simulator

__all__ = [
    "Baseline",
    "Baselines",
    "Conditions",
    "Devices",
    "Engine",
    "Interrupted",
    "LogNormal",
    "RandomDevices",
    "Sequential",
    "Simulator",
    "Stragglers",
    "Trace",
    "TracedDevices",
    "Turn",
]
