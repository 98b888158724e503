"""Simulation: a federation in this process, in virtual time."""

from atoll.simulation.baselines import Baseline, Baselines
from atoll.simulation.choice import Auto, Sequential, Stacked
from atoll.simulation.cluster import RayCluster
from atoll.simulation.devices import (
    Conditions,
    Devices,
    LogNormal,
    RandomDevices,
    Stragglers,
    Trace,
    TracedDevices,
)
from atoll.simulation.engine import Crew, Engine, Local
from atoll.simulation.interrupt import Interrupted
from atoll.simulation.simulator import Simulator

__all__ = [
    "Auto",
    "Baseline",
    "Baselines",
    "Conditions",
    "Crew",
    "Devices",
    "Engine",
    "Interrupted",
    "Local",
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
