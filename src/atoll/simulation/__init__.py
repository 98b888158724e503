"""Simulation: a federation in this process, in virtual time."""

from atoll.backends.backend import Backend, Engine
from atoll.backends.choice import Auto, Sequential, Stacked
from atoll.backends.local import LocalEngine
from atoll.backends.ray import RayCluster
from atoll.simulation.attackers import Attack, Attackers, Boost, RandomNoise, SignFlip
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
from atoll.simulation.interrupt import Interrupted
from atoll.simulation.simulator import Simulator

__all__ = [
    "Attack",
    "Attackers",
    "Boost",
    "RandomNoise",
    "SignFlip",
    "Auto",
    "Baseline",
    "Baselines",
    "Conditions",
    "Backend",
    "Devices",
    "Engine",
    "Interrupted",
    "LocalEngine",
    "LogNormal",
    "RandomDevices",
    "RayCluster",
    "Sequential",
    "Simulator",
    "Stacked",
    "Stragglers",
    "Trace",
    "TracedDevices",
]
