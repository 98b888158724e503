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
    import argparse
    import json

    parser = argparse.ArgumentParser()
    parser.add_argument("--twice", action="store_true")
    for _ in range(1 + parser.parse_args().twice):
        history = fl.simulation.start_simulation(
            client_fn=client_fn,
            num_clients=4,
            config=ServerConfig(num_rounds=2),
            strategy=FedAvg(),
        )
    with open("losses.json", "w") as file:
        json.dump([loss for _, loss in history.losses_distributed], file)
