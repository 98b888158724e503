"""A script of the kind that tutorials have: everything in one file, and a simulation at its end."""

import flwr as fl
import numpy as np
from flwr.client import NumPyClient
from flwr.server import ServerConfig
from flwr.server.strategy import FedAvg


class Client(NumPyClient):
    def __init__(self, cid):
        self.cid = int(cid)

    def get_parameters(self, config):
        return [np.zeros(2)]

    def fit(self, parameters, config):
        return [parameters[0] + self.cid], 1, {}

    def evaluate(self, parameters, config):
        return float(parameters[0][0]), 1, {}


def client_fn(cid):
    return Client(cid)


if __name__ == "__main__":
    history = fl.simulation.start_simulation(
        client_fn=client_fn,
        num_clients=4,
        config=ServerConfig(num_rounds=2),
        strategy=FedAvg(initial_parameters=None),
    )
    raise SystemExit("this line is not reached: what follows belongs to whoever simulates")
