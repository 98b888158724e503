"""Algorithms: what clients do and what the server does. One file per idea."""

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.client import Client
from atoll.algorithms.fedadagrad import FedAdagrad
from atoll.algorithms.fedadam import FedAdam
from atoll.algorithms.fedavg import FedAvg
from atoll.algorithms.fedavgm import FedAvgM
from atoll.algorithms.fedprox import FedProx
from atoll.algorithms.fedsgd import FedSGD
from atoll.algorithms.fedyogi import FedYogi
from atoll.algorithms.scaffold import Scaffold

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
    "Scaffold",
]
