"""Algorithms: what clients do and what the server does. One file per idea."""

from atoll.algorithms import local, server
from atoll.algorithms.algorithm import Algorithm, Gather, Start
from atoll.algorithms.client import Client, Holder
from atoll.algorithms.fedavg import FedAvg
from atoll.algorithms.fedsgd import FedSGD
from atoll.algorithms.local import LocalRule
from atoll.algorithms.named import FedAdagrad, FedAdam, FedAvgM, FedProx, FedYogi
from atoll.algorithms.scaffold import Scaffold
from atoll.algorithms.server import ServerOptimizer

__all__ = [
    "Algorithm",
    "Client",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedSGD",
    "FedYogi",
    "Gather",
    "Holder",
    "LocalRule",
    "Scaffold",
    "ServerOptimizer",
    "Start",
    "local",
    "server",
]
